"""What checkpoints cost a run: the same steps with none, with one stored beside them, and with one waited for.

The ways take turns in one process, in another order each round, so that what else the machine does hits them alike.
"""

import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from igpt_ray import storage
from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.settings import Count, OptionalUri, Section
from igpt_ray.train import checkpoint, loop
from igpt_ray.train.config import PretrainConfig

WAYS = ("none", "beside", "waited")


class BenchCheckpointsConfig(Section):
    """What checkpoints add to a run, stored beside its steps or waited for."""

    place: OptionalUri = ""
    """URI of a folder or bucket to store them in; empty is a temporary folder."""
    n_embd: Count = 256
    """Width of the network, of 8 blocks at 16x16."""
    images: Count = 2
    """Images of a step."""
    steps: Count = 20
    """Steps for each checkpoint."""
    rounds: Count = 9
    """How often each way is tried."""
    threads: Count = 1
    """Threads of a step."""


def checkpoints(settings: BenchCheckpointsConfig) -> dict[str, Any]:
    """How long `steps` steps take whose first begins with a save: what it adds, a share, as quartiles over rounds.

    And the processor's seconds that a save beside the steps takes, which neighbours on the machine disturb less.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(settings.threads)
    model_shape = ModelConfig(n_layer=8, n_embd=settings.n_embd, n_head=8, n_px=16, n_vocab=512)
    cfg = PretrainConfig(model=model_shape)
    model, optimizer = loop.build(cfg, torch.device("cpu"))
    tokens = torch.randint(0, model_shape.n_vocab, (settings.images, model_shape.n_positions))

    def step() -> None:
        (losses.generative(model, tokens) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu_seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    stalls, stored = [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Saver(storage.join(settings.place or folder, "run"), keep=1)
        step()
        saver.save(1, model, optimizer, {})  # the first makes room for the copies that all reuse
        saver.finish()
        for r in range(settings.rounds):
            for way in WAYS[r % 3 :] + WAYS[: r % 3]:
                started, cpu_started = time.perf_counter(), time.process_time()
                if way != "none":
                    saver.save(r + 2, model, optimizer, {}, must=True)
                    stalls.append(time.perf_counter() - started)
                if way == "waited":
                    saver.finish()
                    stored.append(time.perf_counter() - started)
                for _ in range(settings.steps):
                    step()
                seconds[way].append(time.perf_counter() - started)
                saver.finish()
                cpu_seconds[way].append(time.process_time() - cpu_started)
    dist.destroy_process_group()
    added = {way: _over([a / b - 1 for a, b in zip(seconds[way], seconds["none"], strict=True)]) for way in WAYS[1:]}
    cpu_added = _over([a - b for a, b in zip(cpu_seconds["beside"], cpu_seconds["none"], strict=True)])
    return {
        "n_params": model_shape.n_params,
        "checkpoint_mb": round(12 * model_shape.n_params / 1e6),
        "step_seconds": round(statistics.median(seconds["none"]) / settings.steps, 4),
        "stall_seconds": round(statistics.median(stalls), 4),
        "stored_seconds": round(statistics.median(stored), 4),
        "added": added,
        "cpu_seconds_added": cpu_added,
        "rounds": settings.rounds,
    }


def _over(rounds: list[float]) -> list[float]:
    """Quartiles: on a machine that others use too, the spread says how much the median is worth."""
    return [round(q, 4) for q in statistics.quantiles(rounds)]
