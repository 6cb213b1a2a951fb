"""Timings of alternatives that run in turn in one process, so that other load on the machine slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Seconds(NamedTuple):
    """Duration of one call: elapsed time, and processor time of this process, which other load disturbs less."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Runs(Generic[T]):
    """Durations of each alternative, one per round, and its last result."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    results: dict[str, T]


def timed(work: Callable[[], T], device: str = "cpu") -> tuple[Seconds, T]:
    """Run `work` once and return its duration and its result; CUDA is synchronised before the clock stops."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), result


def in_turn(alternatives: Mapping[str, Callable[[], T]], rounds: int, device: str = "cpu") -> Runs[T]:
    """Time each alternative once per round."""
    runs: Runs[T] = Runs({name: [] for name in alternatives}, {name: [] for name in alternatives}, {})
    for _ in range(rounds):
        for name, work in alternatives.items():
            seconds, runs.results[name] = timed(work, device)
            runs.wall[name].append(seconds.wall)
            runs.cpu[name].append(seconds.cpu)
    return runs


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median over rounds of the ratio within a round, so that a slow round slows both sides."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def quartiles(values: list[float], digits: int = 4) -> list[float]:
    """Lower quartile, median and upper quartile, rounded; a single value alone."""
    return [round(q, digits) for q in (statistics.quantiles(values) if len(values) > 1 else values)]
