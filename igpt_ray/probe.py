"""The linear probe: multinomial logistic regression by L-BFGS on features of every layer (paper, section 3.4).

Features are standardised with the mean and deviation of the fitting images. A fifth of the fitting split chooses the
regularisation of each layer and then the best layer; the reported split is looked at once. The paper does not state
its regularisation.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from igpt_ray.errors import TokenStoreError

Features = NDArray[np.float32]
Labels = NDArray[np.int64]

L2 = (1e-5, 1e-4, 1e-3, 1e-2)
"""Penalties tried: l2 / 2 * |W|^2 beside the mean loss, on standardised features."""
HELD_OUT = 5
"""One in this many fitting images chooses."""


@dataclass(frozen=True)
class Labelled:
    """Images as the probe sees them."""

    features: Features
    """(N, D); or (N, M, D) if each was seen under M masks."""
    labels: Labels
    """(N,)"""


def probe(fit: Labelled, test: Labelled, n_classes: int, seed: int) -> dict[str, float]:
    """Accuracies in [0, 1]: `validation` at the best penalty, `test` of a refit on all fitting images; and `l2`.

    Raises `TokenStoreError` if there are fewer than two classes to tell apart, or features are not finite.
    """
    if len(np.unique(fit.labels)) < 2:
        raise TokenStoreError("a probe needs labels of at least two classes in the split it is fitted on")
    if not (np.isfinite(fit.features).all() and np.isfinite(test.features).all()):
        raise TokenStoreError("features are not finite: the release or the token store is damaged")
    held = np.random.default_rng(seed).permutation(len(fit.labels)) % HELD_OUT == 0
    tried = {l2: _accuracy(fit, ~held, fit, held, n_classes, l2) for l2 in L2}
    best = max(tried, key=lambda l2: tried[l2])
    everything, all_test = np.ones(len(fit.labels), bool), np.ones(len(test.labels), bool)
    return {"validation": tried[best], "test": _accuracy(fit, everything, test, all_test, n_classes, best), "l2": best}


def _accuracy(
    fit: Labelled, fit_rows: NDArray[np.bool_], on: Labelled, on_rows: NDArray[np.bool_], n_classes: int, l2: float
) -> float:
    x, y = fit.features[fit_rows], fit.labels[fit_rows]
    if x.ndim == 3:  # every look at an image is an example
        x, y = x.reshape(-1, x.shape[2]), y.repeat(x.shape[1])
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    weight, bias = fit_logistic((x - mean) / deviation, y, n_classes, l2)
    logits = (on.features[on_rows] - mean) / deviation @ weight.T + bias
    chosen = logits.argmax(1) if logits.ndim == 2 else vote(logits)
    return float((chosen == on.labels[on_rows]).mean())


def vote(logits: Features) -> Labels:
    """The class that most masks of an image speak for; of equals, the likelier: (N, M, classes) -> (N,)."""
    n_classes = logits.shape[2]
    votes = np.eye(n_classes)[logits.argmax(2)].sum(1)
    p = torch.from_numpy(logits).double().softmax(2).mean(1).numpy()
    return (votes + p / 2).argmax(1)


def fit_logistic(x: Features, y: Labels, n_classes: int, l2: float) -> tuple[Features, Features]:
    """Minimise mean cross-entropy + l2 / 2 * |W|^2: (N, D), (N,) -> weight (classes, D), bias (classes,).

    Features of a network are strongly correlated, which makes this slow as it stands. So it is solved in V, with
    W = V P' and P the inverse root of (covariance + l2): the same problem and the same minimum, well conditioned.
    """
    features, labels = torch.from_numpy(x).double(), torch.from_numpy(y)
    values, vectors = torch.linalg.eigh(features.T @ features / len(features))
    P = vectors / (values.clamp_min(0) + l2).sqrt()  # (D, D)
    features = features @ P
    V = torch.zeros(n_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [V, bias], max_iter=300, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ V.T + bias, labels) + l2 / 2 * (V @ P.T).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (V @ P.T).detach().float().numpy(), bias.detach().float().numpy()
