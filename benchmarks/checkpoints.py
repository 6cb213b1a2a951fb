"""The cost of checkpoints: the same steps without a checkpoint, with an asynchronous one, and with a synchronous one.

The three modes run in turn in one process, in a different order each round, so that other load on the machine slows
them alike.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.timing import quartiles
from igpt_ray import storage
from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.settings import Count, OptionalUri, Section
from igpt_ray.train import checkpoint, loop
from igpt_ray.train.config import PretrainConfig

MODES = ("none", "asynchronous", "synchronous")


class BenchCheckpointsConfig(Section):
    """Measure what asynchronous and synchronous checkpoints add to a run."""

    root: OptionalUri = ""
    """URI of a folder or bucket for the checkpoints; empty uses a temporary folder."""
    n_embd: Count = 256
    """Width of the network, which has 8 blocks and 16x16 pixels."""
    images: Count = 2
    """Images per step."""
    steps: Count = 20
    """Steps per checkpoint."""
    rounds: Count = 9
    """Repetitions of each mode."""
    threads: Count = 1
    """Threads of torch."""


def checkpoints(settings: BenchCheckpointsConfig) -> dict[str, Any]:
    """Time `steps` steps that begin with a save.

    `added` is the share of time that a save adds, and `cpu_seconds_added` the processor time that an asynchronous save
    adds, both as quartiles over the rounds.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(settings.threads)
    config = ModelConfig(n_layer=8, n_embd=settings.n_embd, n_head=8, n_px=16, n_vocab=512)
    model, optimizer = loop.build(PretrainConfig(model=config), torch.device("cpu"))
    tokens = torch.randint(0, config.n_vocab, (settings.images, config.n_positions))

    def step() -> None:
        (losses.generative(model, tokens) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Saver(storage.join(settings.root or folder, "run"), keep=1)
        step()
        saver.save(1, model, optimizer, {})  # the first save allocates the buffers that later saves reuse
        saver.finish()
        times = measure(
            settings, step, lambda number: saver.save(number, model, optimizer, {}, must=True), saver.finish
        )
    dist.destroy_process_group()
    return report(settings, config, times)


def measure(
    settings: BenchCheckpointsConfig, step: Callable[[], None], save: Callable[[int], Any], finish: Callable[[], Any]
) -> dict[str, list[float]]:
    """Seconds of every round: each mode's elapsed and processor time, the time in `save`, and until it is stored."""
    times: dict[str, list[float]] = {f"{mode}{clock}": [] for mode in MODES for clock in ("", "_cpu")}
    times |= {"stall": [], "stored": []}
    for i in range(settings.rounds):
        for mode in MODES[i % 3 :] + MODES[: i % 3]:
            started, cpu_started = time.perf_counter(), time.process_time()
            if mode != "none":
                save(i + 2)
                times["stall"].append(time.perf_counter() - started)
            if mode == "synchronous":
                finish()
                times["stored"].append(time.perf_counter() - started)
            for _ in range(settings.steps):
                step()
            times[mode].append(time.perf_counter() - started)
            finish()
            times[f"{mode}_cpu"].append(time.process_time() - cpu_started)
    return times


def report(settings: BenchCheckpointsConfig, config: ModelConfig, times: dict[str, list[float]]) -> dict[str, Any]:
    added = {
        mode: quartiles([a / b - 1 for a, b in zip(times[mode], times["none"], strict=True)]) for mode in MODES[1:]
    }
    cpu_added = [a - b for a, b in zip(times["asynchronous_cpu"], times["none_cpu"], strict=True)]
    return {
        "n_params": config.n_params,
        "checkpoint_mb": round(12 * config.n_params / 1e6),
        "step_seconds": round(statistics.median(times["none"]) / settings.steps, 4),
        "stall_seconds": round(statistics.median(times["stall"]), 4),
        "stored_seconds": round(statistics.median(times["stored"]), 4),
        "added": added,
        "cpu_seconds_added": quartiles(cpu_added),
        "rounds": settings.rounds,
    }
