"""What surrounds the arithmetic of a step, and what it costs: FSDP2 on one worker, the loader, Ray Train; and how state
is divided between workers.

Plain and sharded network take turns in one process, step by step. The loop (`training.train`) runs alone and under Ray
Train in turn, on the same settings; its own metrics say how fast it was, and how long it waited for data.
"""

import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from benchmarks.train import timed
from igpt_ray.data.token_store import TokenStore
from igpt_ray.flows import job
from igpt_ray.flows.train import pretrain
from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.settings import Count, Section, Uri
from igpt_ray.train import loop, metrics, optim
from igpt_ray.train.config import DataConfig, OptimConfig, PretrainConfig, RunConfig, WorkersConfig

Report = dict[str, Any]
WINDOW = 5
"""Steps between lines of metrics; a run's speed is the median over them, and the first is left out."""


class BenchOverheadsConfig(Section):
    """What FSDP2, the loader and Ray Train add to a step of one worker, and how two divide its state."""

    tokens: Uri
    """URI of a token store; `make demo` leaves one of digits in demo-out/data/tokens."""
    split: str = "train"
    """Split to train on."""
    n_embd: Count = 256
    """Width of the network, of 8 blocks."""
    images: Count = 64
    """Images of a step."""
    steps: Count = 40
    """Steps of every run."""
    rounds: Count = 3
    """How often the loop runs, alone and under Ray Train."""


def overheads(settings: BenchOverheadsConfig) -> Report:
    """Raises `TokenStoreError` if there is no token store."""
    kind = TokenStore.open(settings.tokens).kind
    model = ModelConfig(n_layer=8, n_embd=settings.n_embd, n_head=8, n_px=kind.n_px, n_vocab=kind.n_vocab)
    with tempfile.TemporaryDirectory() as folder:
        shares = [held_by_each(model, n, folder) for n in (1, 2)]
        loops = [one_round(settings, model, folder, i) for i in range(settings.rounds)]
    ratio = statistics.median(under_ray["step_seconds"] / bare["step_seconds"] for bare, under_ray in loops)
    return {
        "n_params": model.n_params,
        "fsdp": sharded_or_not(settings, model),
        "ray_train_adds": round(ratio - 1, 4),
        "step_seconds": round(statistics.median(bare["step_seconds"] for bare, _ in loops), 4),
        "data_wait": max(run["data_wait"] for pair in loops for run in pair),
        "mb_of_a_worker": {n: [round(each / 1e6, 2) for each in held] for n, held in zip((1, 2), shares, strict=True)},
    }


# ------------------------------------------------------------------------------------------------ FSDP2


def sharded_or_not(settings: BenchOverheadsConfig, model: ModelConfig) -> Report:
    """Seconds of a step of the plain network and of the sharded one, on one worker."""
    _join(0, 1, dist.HashStore())
    torch.set_num_threads(1)
    tokens = torch.randint(0, model.n_vocab, (settings.images, model.n_positions))
    plain = ImageGPT(model)
    ways = {
        "plain": (plain, optim.build(plain, OptimConfig())),
        "fsdp": loop.build(PretrainConfig(model=model), torch.device("cpu")),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(settings.steps + 1):
        for way, (network, optimizer) in ways.items():
            took = timed(partial(_step, network, optimizer, tokens), "cpu")
            if i:
                seconds[way].append(took)
    dist.destroy_process_group()
    ratios = [a / b - 1 for a, b in zip(seconds["fsdp"], seconds["plain"], strict=True)]
    return {"plain_seconds": round(statistics.median(seconds["plain"]), 4), "adds": _quartiles(ratios)}


def _step(model: ImageGPT, optimizer: Optimizer, tokens: Tensor) -> None:
    losses.next_pixel(model(tokens), tokens).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _quartiles(found: list[float]) -> list[float]:
    return [round(q, 4) for q in statistics.quantiles(found)]


# ------------------------------------------------------------------------------------------------ Ray Train, the loader


def one_round(settings: BenchOverheadsConfig, model: ModelConfig, folder: str, i: int) -> tuple[Report, Report]:
    """A run of the loop by itself, in a process like a worker's, and the same under Ray Train."""

    def wanted(name: str) -> PretrainConfig:
        return PretrainConfig(
            model=model,
            data=DataConfig(tokens=settings.tokens, split=settings.split),
            optim=OptimConfig(batch_size=settings.images, steps=settings.steps, warmup_steps=1),
            workers=WorkersConfig(micro_batch=settings.images),
            run=RunConfig(root=folder, name=f"{name}-{i}", log_every=WINDOW),
        )

    alone, under_ray = wanted("alone"), wanted("ray")
    torch.multiprocessing.spawn(_alone, (alone.model_dump_json(),), nprocs=1)
    job.connect()
    pretrain(under_ray)
    return _speed(alone), _speed(under_ray)


def _alone(rank: int, settings: str) -> None:
    os.nice(15)  # as Ray's workers are
    _join(rank, 1, dist.HashStore())
    torch.set_num_threads(1)
    loop.train(PretrainConfig.model_validate_json(settings), torch.device("cpu"))
    dist.destroy_process_group()


def _speed(run: PretrainConfig) -> Report:
    lines = metrics.read(run.run.uri)[1:]
    tokens = run.optim.batch_size * run.model.n_positions
    return {
        "step_seconds": statistics.median(tokens / line["tokens_per_second"] for line in lines),
        "data_wait": max(line["data_wait"] for line in lines),
    }


# ------------------------------------------------------------------------------------------------ memory


def held_by_each(model: ModelConfig, n: int, folder: str) -> list[int]:
    """Bytes of weights, gradients and moments that each of n workers holds after a step."""
    torch.multiprocessing.spawn(_held, (n, model.model_dump_json(), folder), nprocs=n)
    return [int(Path(folder, f"held-{n}-{rank}").read_text()) for rank in range(n)]


def _held(rank: int, n: int, model: str, folder: str) -> None:
    _join(rank, n, dist.FileStore(f"{folder}/store-{n}", n))
    shape = ModelConfig.model_validate_json(model)
    network, optimizer = loop.build(PretrainConfig(model=shape), torch.device("cpu"))
    tokens = torch.randint(0, shape.n_vocab, (1, shape.n_positions))
    losses.next_pixel(network(tokens), tokens).mean().backward()
    optimizer.step()
    parameters = list(network.parameters())
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, DTensor)]
    gradients = [cast(Tensor, p.grad) for p in parameters]
    held = sum(cast(DTensor, x).to_local().nbytes for x in [*parameters, *gradients, *moments])
    Path(folder, f"held-{n}-{rank}").write_text(str(held))
    dist.destroy_process_group()


def _join(rank: int, n: int, store: dist.Store) -> None:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
