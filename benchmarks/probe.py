"""A probe's logistic regression beside scikit-learn's, taking turns in one process.

The features are made up, or those of a layer of a folder that jobs/features.py wrote. Those made up are correlated as a
network's are: variances fall as rank ** -2, in directions that mix all features (those of 1,797 digits in the middle
of an untrained network of width 128 fall from 49 to 2e-4). The gap is to the lowest loss of all that is found, ours in
float64 included; both minimise the same loss on the same standardised float32 features. Ours and scikit-learn's also
stop after some iterations, or go on until their own tolerance: so there are times to compare at equal gaps.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from igpt_ray.evaluate.features import Features, FeatureStore, Labels
from igpt_ray.evaluate.logistic import MAX_ITERATIONS, gradient, minimise, moments
from igpt_ray.settings import Count, OptionalUri, Section


class BenchProbeConfig(Section):
    """Fit a probe beside scikit-learn's logistic regression."""

    features: OptionalUri = ""
    """URI of features; empty makes up some that are correlated as a network's are."""
    split: str = "train"
    """Split of those features."""
    layer: int = 0
    """Layer of those features."""
    rows: Count = 50_000
    """Images made up."""
    width: Count = 512
    """Features of each."""
    classes: Annotated[int, Field(ge=2)] = 10
    """Classes."""
    l2: Annotated[float, Field(gt=0)] = 1e-4
    """Penalty, l2 / 2 * |W|^2 added to the mean loss."""
    rounds: Count = 3
    """How often each takes its turn; figures are quartiles."""
    threads: Count = 2
    """Of both."""


Fit = Callable[[Features, Labels], tuple[NDArray[np.floating], NDArray[np.floating]]]
"""Features (N, C) and labels -> weight (K, C) and bias (K,)."""


def probe(settings: BenchProbeConfig) -> dict[str, Any]:
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(settings.threads)
    x, y = features(settings)
    n_classes = int(y.max()) + 1
    fits = {
        "ours": ours(n_classes, settings.l2, MAX_ITERATIONS),
        "ours, 10": ours(n_classes, settings.l2, 10),
        "ours, 40": ours(n_classes, settings.l2, 40),
        "scikit-learn": scikit_learn(settings.l2, 100),  # its default
        "scikit-learn, on": scikit_learn(settings.l2, 10_000),
    }
    wall: dict[str, list[float]] = {name: [] for name in fits}
    cpu: dict[str, list[float]] = {name: [] for name in fits}
    losses, chosen = {}, {}
    for _ in range(settings.rounds):
        for name, fit in fits.items():
            with threadpool_limits(settings.threads):
                started, cpu_started = time.perf_counter(), time.process_time()
                weight, bias = fit(x, y)
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - cpu_started)
            losses[name] = loss(weight, bias, x, y, settings.l2)
            chosen[name] = (x @ weight.T + bias).argmax(1)
    exact = minimise(torch.from_numpy(x).double(), torch.from_numpy(y), n_classes, (settings.l2,))[settings.l2]
    lowest = min(loss(*exact, x, y, settings.l2), *losses.values())
    return {
        "rows": len(x),
        "features": x.shape[1],
        "classes": n_classes,
        "l2": settings.l2,
        "threads": settings.threads,
        "loss": lowest,
        "gap": {name: losses[name] - lowest for name in fits},
        "seconds": {name: [round(s, 3) for s in quartiles(found)] for name, found in wall.items()},
        "cpu_seconds": {name: [round(s, 3) for s in quartiles(found)] for name, found in cpu.items()},
        "faster": over_ours(wall),
        "faster_cpu": over_ours(cpu),
        "equal_predictions": {name: float((chosen[name] == chosen["ours"]).mean()) for name in fits},
        "accuracy": float((chosen["ours"] == y).mean()),
    }


def features(settings: BenchProbeConfig) -> tuple[Features, Labels]:
    """Standardised."""
    if settings.features:
        x, y = FeatureStore(settings.features).layer(settings.split, settings.layer)
    else:
        x, y = made_up(settings.rows, settings.width, settings.classes)
    mean, deviation = moments(x, np.arange(len(x)))
    return (x - mean) / deviation, y


def made_up(n: int, width: int, n_classes: int) -> tuple[Features, Labels]:
    rng = np.random.default_rng(0)
    mixed = np.linalg.qr(rng.normal(size=(width, width)))[0]
    y = rng.integers(0, n_classes, n)
    centres = 0.5 * rng.normal(size=(n_classes, width)) * (rng.random(width) < 0.15)
    falling = np.arange(1.0, width + 1) ** -1
    return ((rng.normal(size=(n, width)) + centres[y]) * falling @ mixed).astype(np.float32), y


def ours(n_classes: int, l2: float, most: int) -> Fit:
    return lambda x, y: minimise(torch.from_numpy(x), torch.from_numpy(y), n_classes, (l2,), most)[l2]


def scikit_learn(l2: float, max_iter: int) -> Fit:
    """Its defaults but for the penalty, and how long it may go on until its own tolerance is met."""
    from sklearn.linear_model import LogisticRegression

    def fit(x: Features, y: Labels) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        found = LogisticRegression(C=1 / (l2 * len(x)), max_iter=max_iter).fit(x, y)
        return found.coef_, found.intercept_

    return fit


def loss(weight: NDArray[np.floating], bias: NDArray[np.floating], x: Features, y: Labels, l2: float) -> float:
    """In float64."""
    w, b = (torch.from_numpy(np.asarray(part, np.float64)) for part in (weight, bias))
    nats: Tensor = gradient(torch.from_numpy(x).double(), torch.from_numpy(y), w, b)[0]
    return float(nats + l2 / 2 * w.square().sum())


def over_ours(taken: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds of each way's time over ours in the same round."""
    return {
        name: round(statistics.median(b / a for a, b in zip(taken["ours"], times, strict=True)), 1)
        for name, times in taken.items()
        if name != "ours"
    }


def quartiles(rounds: list[float]) -> list[float]:
    return statistics.quantiles(rounds) if len(rounds) > 1 else rounds
