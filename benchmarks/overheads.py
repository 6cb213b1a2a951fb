"""Overheads of FSDP2, the data loader and Ray Train on a training step, and the memory of a worker with FSDP2.

The plain and the sharded network step in turn in one process. The loop (`igpt_ray.train.loop.train`) runs with the same
settings with and without Ray Train, in turn; the speeds and the waits for data come from its own metrics.
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

from benchmarks.timing import in_turn, quartiles
from igpt_ray.data.token_store import TokenStore
from igpt_ray.flows import job
from igpt_ray.flows.train import pretrain
from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.settings import Count, Section, Uri
from igpt_ray.train import loop, metrics, optim
from igpt_ray.train.alone import train_alone
from igpt_ray.train.config import DataConfig, OptimConfig, PretrainConfig, RunConfig, WorkersConfig

Report = dict[str, Any]


class BenchOverheadsConfig(Section):
    """Measure what FSDP2, the loader and Ray Train add to a step, and the memory of one and of two workers."""

    tokens: Uri
    """URI of a token store; `make demo` writes one of digits to demo-out/data/tokens."""
    split: str = "train"
    """Split to train on."""
    n_embd: Count = 256
    """Width of the network, which has 8 blocks."""
    images: Count = 64
    """Images per step."""
    steps: Count = 40
    """Steps of every run."""
    rounds: Count = 3
    """Repetitions of the loop, with and without Ray Train."""


def overheads(settings: BenchOverheadsConfig) -> Report:
    """Return step times, the shares of time that FSDP2 and Ray Train add, and megabytes per worker.

    Raises `TokenStoreError` if there is no token store.
    """
    kind = TokenStore.open(settings.tokens).kind
    model = ModelConfig(n_layer=8, n_embd=settings.n_embd, n_head=8, n_px=kind.n_px, n_vocab=kind.n_vocab)
    with tempfile.TemporaryDirectory() as folder:
        memory = {n: [round(size / 1e6, 2) for size in worker_bytes(model, n, folder)] for n in (1, 2)}
        loops = [one_round(settings, model, folder, i) for i in range(settings.rounds)]
    ratio = statistics.median(under_ray["step_seconds"] / bare["step_seconds"] for bare, under_ray in loops)
    return {
        "n_params": model.n_params,
        "fsdp": fsdp_overhead(settings, model),
        "ray_train_adds": round(ratio - 1, 4),
        "step_seconds": round(statistics.median(bare["step_seconds"] for bare, _ in loops), 4),
        "data_wait": max(run["data_wait"] for pair in loops for run in pair),
        "mb_of_a_worker": memory,
    }


# ------------------------------------------------------------------------------------------------ FSDP2


def fsdp_overhead(settings: BenchOverheadsConfig, model: ModelConfig) -> Report:
    """Seconds per step of the plain network, and the share of time that FSDP2 on one worker adds."""
    _join(0, 1, dist.HashStore())
    torch.set_num_threads(1)
    tokens = torch.randint(0, model.n_vocab, (settings.images, model.n_positions))
    plain = ImageGPT(model)
    networks = {
        "plain": (plain, optim.build(plain, OptimConfig())),
        "fsdp": loop.build(PretrainConfig(model=model), torch.device("cpu")),
    }
    steps = {name: partial(_step, *network, tokens) for name, network in networks.items()}
    in_turn(steps, 1)  # the first step allocates gradients and moments
    seconds = in_turn(steps, settings.steps).wall
    dist.destroy_process_group()
    ratios = [a / b - 1 for a, b in zip(seconds["fsdp"], seconds["plain"], strict=True)]
    return {"plain_seconds": round(statistics.median(seconds["plain"]), 4), "adds": quartiles(ratios)}


def _step(model: ImageGPT, optimizer: Optimizer, tokens: Tensor) -> None:
    losses.next_pixel(model(tokens), tokens).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------ Ray Train, the loader


def one_round(settings: BenchOverheadsConfig, model: ModelConfig, folder: str, i: int) -> tuple[Report, Report]:
    """Speeds of the loop in a process of its own, and under Ray Train."""

    def config(name: str) -> PretrainConfig:
        return PretrainConfig(
            model=model,
            data=DataConfig(tokens=settings.tokens, split=settings.split),
            optim=OptimConfig(batch_size=settings.images, steps=settings.steps, warmup_steps=1),
            workers=WorkersConfig(micro_batch=settings.images),
            run=RunConfig(root=folder, name=f"{name}-{i}", log_every=5),
        )

    alone, under_ray = config("alone"), config("ray")
    torch.multiprocessing.spawn(_alone, (alone.model_dump_json(),), nprocs=1)
    job.connect()
    pretrain(under_ray)
    return _speed(alone), _speed(under_ray)


def _alone(rank: int, settings: str) -> None:
    os.nice(15)  # the priority of Ray's workers
    torch.set_num_threads(1)
    train_alone(PretrainConfig.model_validate_json(settings), torch.device("cpu"))


def _speed(run: PretrainConfig) -> Report:
    """Medians over the lines of the run's metrics, without the first, which includes the start."""
    lines = metrics.read(run.run.uri)[1:]
    tokens = run.optim.batch_size * run.model.n_positions
    return {
        "step_seconds": statistics.median(tokens / line["tokens_per_second"] for line in lines),
        "data_wait": max(line["data_wait"] for line in lines),
    }


# ------------------------------------------------------------------------------------------------ memory


def worker_bytes(model: ModelConfig, n: int, folder: str) -> list[int]:
    """Bytes of weights, gradients and moments in each of n workers after a step."""
    torch.multiprocessing.spawn(_write_bytes, (n, model.model_dump_json(), folder), nprocs=n)
    return [int(Path(folder, f"bytes-{n}-{rank}").read_text()) for rank in range(n)]


def _write_bytes(rank: int, n: int, model: str, folder: str) -> None:
    _join(rank, n, dist.FileStore(f"{folder}/store-{n}", n))
    config = ModelConfig.model_validate_json(model)
    network, optimizer = loop.build(PretrainConfig(model=config), torch.device("cpu"))
    tokens = torch.randint(0, config.n_vocab, (1, config.n_positions))
    losses.next_pixel(network(tokens), tokens).mean().backward()
    optimizer.step()
    parameters = list(network.parameters())
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, DTensor)]
    gradients = [cast(Tensor, p.grad) for p in parameters]
    size = sum(cast(DTensor, x).to_local().nbytes for x in [*parameters, *gradients, *moments])
    Path(folder, f"bytes-{n}-{rank}").write_text(str(size))
    dist.destroy_process_group()


def _join(rank: int, n: int, store: dist.Store) -> None:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
