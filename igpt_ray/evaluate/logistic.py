"""Multinomial logistic regression: L-BFGS for features that fit in memory, and SGD for larger ones.

Both standardise features with mean and standard deviation of the fitted rows, and minimise the mean cross-entropy;
L-BFGS adds l2 / 2 * |W|^2, with W on standardised features.

    N rows   C features   K classes
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt_ray.data.loader import global_batch
from igpt_ray.evaluate.config import SgdConfig
from igpt_ray.evaluate.features import Features, Labels

CHUNK = 4096
"""Rows processed at once: they stay in the CPU cache between the two matrix products that read them."""
MAX_ITERATIONS = 500
"""Of L-BFGS; typical fits need about 50."""
MOMENTUM = 0.9
DEVIATION = 1e-6
"""Added to every standard deviation, so that a constant feature becomes zero."""


@dataclass(frozen=True)
class Linear:
    """A fitted classifier: logits = (x - mean) / deviation @ weight.T + bias."""

    mean: Features
    deviation: Features
    weight: Features
    """(K, C)"""
    bias: Features

    def logits(self, x: Features) -> Features:
        """(..., C) -> (..., K)"""
        return ((x - self.mean) / self.deviation @ self.weight.T + self.bias).astype(np.float32)


def moments(x: Features, rows: NDArray[np.int64]) -> tuple[Features, Features]:
    """Mean and standard deviation of some rows, each (C,), in two passes over chunks."""
    mean, variance = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for part in _parts(x, rows):
        mean += part.sum(0, dtype=np.float64) / len(rows)
    for part in _parts(x, rows):
        variance += np.square(part - mean).sum(0) / len(rows)
    return mean.astype(np.float32), (np.sqrt(variance) + DEVIATION).astype(np.float32)


def _parts(x: Features, rows: NDArray[np.int64]) -> Iterator[Features]:
    for start in range(0, len(rows), CHUNK):
        yield x[rows[start : start + CHUNK]]


def probabilities(logits: Features) -> NDArray[np.float64]:
    """Softmax over the last axis, in float64 so that ties and sums are exact enough to compare."""
    return torch.from_numpy(logits).double().softmax(-1).numpy()


# ------------------------------------------------------------------------------------------------ L-BFGS


def fit_lbfgs(
    x: Features, y: Labels, rows: NDArray[np.int64], n_classes: int, l2s: Sequence[float], device: str = "cpu"
) -> dict[float, Linear]:
    """The fit to some rows of (N, C) at each penalty."""
    mean, deviation = moments(x, rows)
    standard = x[rows]
    standard -= mean
    standard /= deviation
    if len(rows) <= CHUNK:  # float64 is cheap for few rows; in float32, rounding would stall the line search
        standard = standard.astype(np.float64)
    fitted = minimise(torch.from_numpy(standard).to(device), torch.from_numpy(y[rows]).to(device), n_classes, l2s)
    return {l2: Linear(mean, deviation, *weights) for l2, weights in fitted.items()}


def minimise(
    x: Tensor, y: Tensor, n_classes: int, l2s: Sequence[float], max_iterations: int = MAX_ITERATIONS
) -> dict[float, tuple[Features, Features]]:
    """The minimum at each penalty, as weight (K, C) and bias (K,): (N, C), (N,). Stops after `max_iterations`.

    Features of a network are strongly correlated, so the problem in W is badly conditioned. It is solved in V instead,
    with W = V P' and P the inverse square root of curvature * covariance + l2, which approximates the Hessian. The
    minimum is the same. Penalties go from the largest to the smallest; each starts at the previous minimum.
    """
    if len(x) < x.shape[1]:  # the minimum is in the span of the rows
        basis = torch.linalg.qr(x.T)[0]  # (C, N)
        within = minimise(x @ basis, y, n_classes, l2s, max_iterations)
        return {l2: (w @ basis.T.cpu().numpy(), b) for l2, (w, b) in within.items()}
    values, vectors = torch.linalg.eigh((x.T @ x).double() / len(x))
    values = values.clamp_min(0)
    weight = torch.zeros(n_classes, x.shape[1], dtype=torch.float64, device=x.device)
    bias = torch.bincount(y, minlength=n_classes).double().add(1).log()
    minima, curvature = {}, (1 - 1 / n_classes) / n_classes
    for l2 in sorted(l2s, reverse=True):
        scale = (curvature * values + l2).sqrt()
        weight, bias = _descend(x, y, weight, bias, l2, vectors, scale, max_iterations)
        minima[l2] = (weight.float().cpu().numpy(), bias.float().cpu().numpy())
    return minima


def _descend(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, l2: float, vectors: Tensor, scale: Tensor, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """L-BFGS from an initial weight and bias, in the coordinates V = W vectors * scale.

    Stops when a step gains less than 2e-9 nats, about the rounding error of float32 products.
    """
    V, b = (weight @ vectors * scale).requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [V, b],
        max_iter=max_iterations,
        history_size=30,
        tolerance_grad=1e-7,
        tolerance_change=2e-9,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def loss() -> Tensor:
        W = V / scale @ vectors.T
        nats, by_weight, by_bias = gradient(x, y, W, b)
        V.grad = (by_weight + l2 * W) @ vectors / scale
        b.grad = by_bias
        return nats + l2 / 2 * W.square().sum()

    optimizer.step(loss)
    return (V / scale @ vectors.T).detach(), b.detach()


def gradient(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean nats of the labels and the gradients of weight and bias: sums in float64, products in the type of x."""
    nats = torch.zeros((), dtype=torch.float64, device=x.device)
    by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    w, b = weight.to(x.dtype).T, bias.to(x.dtype)
    for rows, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        logits = (rows @ w + b).T.contiguous()  # (K, n): few classes, many rows: sums run along contiguous memory
        logp = torch.log_softmax(logits, dim=0)
        nats -= logp.gather(0, labels[None]).sum(dtype=torch.float64)
        wrong = logp.exp_().scatter_add_(0, labels[None], -torch.ones_like(logp[:1]))
        by_weight += wrong @ rows
        by_bias += wrong.sum(1, dtype=torch.float64)
    return nats / len(x), by_weight / len(x), by_bias / len(x)


# ------------------------------------------------------------------------------------------------ SGD


def fit_sgd(
    x: Features, y: Labels, rows: NDArray[np.int64], n_classes: int, sgd: SgdConfig, seed: int, device: str = "cpu"
) -> dict[float, Linear]:
    """The paper's SGD for ImageNet at all learning rates at once, on the same batches; x may be a memory map.

    Every step reads `batch_size` rows; their order is a function of the seed. The result lacks learning rates at which
    the fit diverged.
    """
    mean, deviation = moments(x, rows)
    lrs = torch.tensor(sgd.lrs, device=device)[:, None, None]
    weight = torch.zeros(len(sgd.lrs), n_classes, x.shape[1] + 1, device=device)  # (rates, K, C + 1): the bias is last
    velocity = torch.zeros_like(weight)
    for step in range(sgd.steps):
        batch = rows[global_batch(seed, step, sgd.batch_size, len(rows)).rows]
        standard = torch.from_numpy((x[batch] - mean) / deviation).to(device)
        inputs = torch.cat([standard, torch.ones(len(batch), 1, device=device)], dim=1)  # (B, C + 1)
        logits = weight.flatten(0, 1) @ inputs.T  # (rates * K, B)
        wrong = logits.view(len(sgd.lrs), n_classes, -1).softmax(1)
        wrong[:, torch.from_numpy(y[batch]).to(device), torch.arange(len(batch), device=device)] -= 1
        velocity.mul_(MOMENTUM).add_((wrong.flatten(0, 1) @ inputs).view_as(weight) / len(batch))
        weight -= lrs * (0.5 + 0.5 * math.cos(math.pi * step / sgd.steps)) * velocity
    fitted = zip(sgd.lrs, weight.cpu().numpy(), strict=True)
    return {lr: Linear(mean, deviation, w[:, :-1], w[:, -1]) for lr, w in fitted if np.isfinite(w).all()}
