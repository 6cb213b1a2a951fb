"""A probe's logistic regression compared with scikit-learn's.

The features are synthetic, or those of one layer in a feature store. Synthetic features are correlated as a network's
are: variances fall as rank ** -2, in directions that mix all features. (The variances of 1,797 digits in the middle
layer of an untrained network of width 128 fall from 49 to 2e-4.) Both sides minimise the same loss on the same
standardised float32 features. The gap is the distance to the lowest loss of all fits, including ours in float64. Ours
and scikit-learn's also stop after a few iterations, or continue until their own tolerance, so that the report has times
at equal gaps.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from benchmarks.timing import in_turn, median_ratio, quartiles
from igpt_ray.evaluate.features import Features, FeatureStore, Labels
from igpt_ray.evaluate.logistic import MAX_ITERATIONS, gradient, minimise, moments
from igpt_ray.settings import Count, OptionalUri, Section


class BenchProbeConfig(Section):
    """Fit a linear probe, and compare it with scikit-learn's logistic regression."""

    features: OptionalUri = ""
    """URI of a feature store; empty uses synthetic features."""
    split: str = "train"
    """Split of the feature store."""
    layer: int = 0
    """Layer of the feature store."""
    rows: Count = 50_000
    """Synthetic images."""
    width: Count = 512
    """Synthetic features per image."""
    classes: Annotated[int, Field(ge=2)] = 10
    """Synthetic classes."""
    l2: Annotated[float, Field(gt=0)] = 1e-4
    """Penalty: l2 / 2 * |W|^2 is added to the mean loss."""
    rounds: Count = 3
    """Repetitions; times are quartiles over them."""
    threads: Count = 2
    """Threads of both libraries."""


Parameters = tuple[NDArray[np.floating], NDArray[np.floating]]
"""Weight (K, C) and bias (K,)."""
Fit = Callable[[Features, Labels], Parameters]
"""Features (N, C) and labels (N,) -> parameters."""


def probe(settings: BenchProbeConfig) -> dict[str, Any]:
    """Return loss gaps, times and agreement of the predictions; `faster` is the ratio of times to ours."""
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(settings.threads)
    x, y = features(settings)
    n_classes = int(y.max()) + 1
    fits = {
        "ours": ours(n_classes, settings.l2, MAX_ITERATIONS),
        "ours, 10": ours(n_classes, settings.l2, 10),
        "ours, 40": ours(n_classes, settings.l2, 40),
        "scikit-learn": scikit_learn(settings.l2, 100),  # scikit-learn's default
        "scikit-learn, on": scikit_learn(settings.l2, 10_000),
    }
    with threadpool_limits(settings.threads):
        runs = in_turn({name: partial(fit, x, y) for name, fit in fits.items()}, settings.rounds)
    losses = {name: loss(*fitted, x, y, settings.l2) for name, fitted in runs.results.items()}
    predictions = {name: (x @ weight.T + bias).argmax(1) for name, (weight, bias) in runs.results.items()}
    exact = minimise(torch.from_numpy(x).double(), torch.from_numpy(y), n_classes, (settings.l2,))[settings.l2]
    lowest = min(loss(*exact, x, y, settings.l2), *losses.values())
    others = [name for name in fits if name != "ours"]
    return {
        "rows": len(x),
        "features": x.shape[1],
        "classes": n_classes,
        "l2": settings.l2,
        "threads": settings.threads,
        "loss": lowest,
        "gap": {name: losses[name] - lowest for name in fits},
        "seconds": {name: quartiles(seconds, 3) for name, seconds in runs.wall.items()},
        "cpu_seconds": {name: quartiles(seconds, 3) for name, seconds in runs.cpu.items()},
        "faster": {name: round(median_ratio(runs.wall[name], runs.wall["ours"]), 1) for name in others},
        "faster_cpu": {name: round(median_ratio(runs.cpu[name], runs.cpu["ours"]), 1) for name in others},
        "equal_predictions": {name: float((predictions[name] == predictions["ours"]).mean()) for name in fits},
        "accuracy": float((predictions["ours"] == y).mean()),
    }


def features(settings: BenchProbeConfig) -> tuple[Features, Labels]:
    """Standardised features and their labels."""
    if settings.features:
        x, y = FeatureStore(settings.features).layer(settings.split, settings.layer)
    else:
        x, y = synthetic(settings.rows, settings.width, settings.classes)
    mean, deviation = moments(x, np.arange(len(x)))
    return (x - mean) / deviation, y


def synthetic(n: int, width: int, n_classes: int) -> tuple[Features, Labels]:
    """Correlated features of `n_classes` overlapping classes, from a fixed seed."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
    y = rng.integers(0, n_classes, n)
    centres = 0.5 * rng.normal(size=(n_classes, width)) * (rng.random(width) < 0.15)
    deviations = np.arange(1.0, width + 1) ** -1
    return ((rng.normal(size=(n, width)) + centres[y]) * deviations @ rotation).astype(np.float32), y


def ours(n_classes: int, l2: float, max_iter: int) -> Fit:
    return lambda x, y: minimise(torch.from_numpy(x), torch.from_numpy(y), n_classes, (l2,), max_iter)[l2]


def scikit_learn(l2: float, max_iter: int) -> Fit:
    """scikit-learn's defaults, except for the penalty and the limit of iterations."""
    from sklearn.linear_model import LogisticRegression

    def fit(x: Features, y: Labels) -> Parameters:
        fitted = LogisticRegression(C=1 / (l2 * len(x)), max_iter=max_iter).fit(x, y)
        return fitted.coef_, fitted.intercept_

    return fit


def loss(weight: NDArray[np.floating], bias: NDArray[np.floating], x: Features, y: Labels, l2: float) -> float:
    """Penalised mean cross-entropy in nats, computed in float64."""
    w, b = (torch.from_numpy(np.asarray(part, np.float64)) for part in (weight, bias))
    nats: Tensor = gradient(torch.from_numpy(x).double(), torch.from_numpy(y), w, b)[0]
    return float(nats + l2 / 2 * w.square().sum())
