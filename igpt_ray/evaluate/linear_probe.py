"""The linear probe: how well a linear classifier tells classes apart by the features of a layer (paper, section 3.4).

A fifth of the fitting images is held out to choose the penalty (or SGD's learning rate) of each layer, and then the
layer; what is chosen is fitted again on all of them and shown the test images once. Features are standardised by the
mean and deviation of the images they are fitted on. The paper does not state its regularisation.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from igpt_ray.errors import FeatureError
from igpt_ray.evaluate.config import SgdConfig
from igpt_ray.evaluate.features import Features, Labels
from igpt_ray.evaluate.logistic import Linear, fit_lbfgs, fit_sgd, probabilities

L2 = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Penalties tried: l2 / 2 * |W|^2 beside the mean loss, on standardised features."""
HELD_OUT = 5
"""One in this many fitting images chooses."""
CHUNK = 8192
"""Images that are judged at once."""
BINS = 15
"""Of confidence, for the calibration error."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Labelled:
    """Images as the probe sees them. Raises `FeatureError` if labels are missing."""

    features: Features
    """(N, C); or (N, M, C) if each was seen under M masks. May be a memory map."""
    labels: Labels
    """(N,)"""

    def __post_init__(self) -> None:
        check_labels(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def examples(self) -> tuple[Features, Labels]:
        """Every look at an image is an example: (N * M, C), (N * M,)."""
        if self.features.ndim == 2:
            return self.features, self.labels
        return self.features.reshape(-1, self.features.shape[2]), self.labels.repeat(self.features.shape[1])

    def examples_of(self, rows: Rows) -> Rows:
        looks = 1 if self.features.ndim == 2 else self.features.shape[1]
        return (rows[:, None] * looks + np.arange(looks)).ravel()


@dataclass(frozen=True)
class Method:
    """How a classifier is fitted: the candidates it offers are penalties, or SGD's learning rates."""

    name: Literal["lbfgs", "sgd"] = "lbfgs"
    sgd: SgdConfig = field(default_factory=SgdConfig)
    seed: int = 0
    device: str = "cpu"

    @property
    def candidates(self) -> tuple[float, ...]:
        return L2 if self.name == "lbfgs" else self.sgd.lrs

    def fit(self, data: Labelled, rows: Rows, n_classes: int, tried: tuple[float, ...]) -> dict[float, Linear]:
        x, y = data.examples
        examples = data.examples_of(rows)
        if self.name == "lbfgs":
            return fit_lbfgs(x, y, examples, n_classes, tried, self.device)
        sgd = self.sgd.model_copy(update={"lrs": tried})
        return fit_sgd(x, y, examples, n_classes, sgd, self.seed, self.device)


@dataclass(frozen=True)
class Choice:
    """What the held-out images say of a layer."""

    validation: float
    """Accuracy in [0, 1]."""
    setting: float
    """The penalty, or the learning rate, that gave it."""


def held_out(n: int, seed: int) -> tuple[Rows, Rows]:
    """The rows that fit and those that choose: a function of the number of rows and the seed."""
    choosing = np.random.default_rng(seed).permutation(n) % HELD_OUT == 0
    return np.flatnonzero(~choosing), np.flatnonzero(choosing)


def select(data: Labelled, n_classes: int, seed: int, method: Method) -> Choice:
    """The best candidate by the held-out fifth; of equals the first.

    Raises `FeatureError` if there are fewer than two classes to tell apart, features are not finite, or nothing fits.
    """
    _check(data)
    fitting, choosing = held_out(len(data), seed)
    fitted = method.fit(data, fitting, n_classes, method.candidates)
    if not fitted:
        raise FeatureError(f"SGD diverged at every learning rate of {method.candidates}: lower --sgd.lrs")
    accuracy = {c: evaluate_classifier(linear, data, choosing, n_classes).accuracy for c, linear in fitted.items()}
    best = max(sorted(accuracy), key=lambda c: accuracy[c])
    return Choice(accuracy[best], best)


def refit(data: Labelled, n_classes: int, setting: float, method: Method) -> Linear:
    """The classifier of a choice, on all fitting images."""
    _check(data)
    fitted = method.fit(data, np.arange(len(data)), n_classes, (setting,))
    if not fitted:
        raise FeatureError(f"SGD diverged at the learning rate {setting} on all images: lower --sgd.lrs")
    return fitted[setting]


def check_labels(labels: Labels) -> None:
    """Raises `FeatureError` if labels are missing."""
    missing = int((labels < 0).sum())
    if missing:
        raise FeatureError(f"{missing} of {len(labels)} images have no label: probe splits whose images all have one")


def check_classes(labels: Labels) -> None:
    """Raises `FeatureError` if there are fewer than two classes to tell apart."""
    if len(np.unique(labels)) < 2:
        raise FeatureError("a probe needs labels of at least two classes in the split it is fitted on")


def _check(data: Labelled) -> None:
    check_classes(data.labels)
    for start in range(0, len(data), CHUNK):
        check_finite(data.features[start : start + CHUNK])


def check_finite(features: Features) -> None:
    if not np.isfinite(features).all():
        raise FeatureError("features are not finite: the release, its features or the token store is damaged")


# ------------------------------------------------------------------------------------------------ judging


@dataclass(frozen=True)
class Judgement:
    """Sums over images."""

    confusion: NDArray[np.int64]
    """(classes, classes): images by true and by chosen class."""
    top_5: int
    nats_sum: float
    """Of the labels under the predicted distribution."""
    bins: NDArray[np.float64]
    """(BINS, 3): images, their confidence and their hits, by confidence."""

    def __add__(self, other: "Judgement") -> "Judgement":
        return Judgement(
            self.confusion + other.confusion,
            self.top_5 + other.top_5,
            self.nats_sum + other.nats_sum,
            self.bins + other.bins,
        )

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(self.confusion.trace() / self.images)

    def report(self) -> dict[str, float]:
        """Shares of images; `ece` is the expected calibration error, the mean distance of confidence and accuracy."""
        return {
            "accuracy": self.accuracy,
            "top_5": self.top_5 / self.images,
            "nats": self.nats_sum / self.images,
            "ece": float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum() / self.images),
        }


def evaluate_classifier(linear: Linear, data: Labelled, rows: Rows, n_classes: int) -> Judgement:
    """What a classifier makes of some images, a chunk at a time."""
    judged = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        features = data.features[part]
        check_finite(features)
        judged.append(judge_logits(linear.logits(features), data.labels[part], n_classes))
    return sum(judged[1:], judged[0])


def judge_logits(logits: Features, labels: Labels, n_classes: int) -> Judgement:
    """(N, K), or (N, M, K) of M looks that vote."""
    p = probabilities(logits)
    if p.ndim == 3:
        scores, p = votes(p), p.mean(1)
    else:
        scores = p
    order = np.argsort(-scores, axis=1, kind="stable")
    chosen = order[:, 0]
    confidence, hit = p[np.arange(len(p)), chosen], (chosen == labels).astype(float)
    at = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = np.stack([np.bincount(at, of, BINS) for of in (np.ones(len(at)), confidence, hit)], axis=1)
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (labels, chosen), 1)
    return Judgement(
        confusion=confusion,
        top_5=int((order[:, :5] == labels[:, None]).any(1).sum()),
        nats_sum=float(-np.log(p[np.arange(len(p)), labels].clip(1e-300)).sum()),
        bins=bins.astype(np.float64),
    )


def votes(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many masks of an image speak for a class; of equals, the likelier is ahead: (N, M, K) -> (N, K)."""
    return np.eye(p.shape[2])[p.argmax(2)].sum(1) + p.mean(1) / 2


def summary(linear: Linear, test: Labelled, n_classes: int) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """The report on a test split, and its confusion matrix."""
    if not len(test):
        raise FeatureError("there are no images to report on")
    judged = evaluate_classifier(linear, test, np.arange(len(test)), n_classes)
    return judged.report(), judged.confusion
