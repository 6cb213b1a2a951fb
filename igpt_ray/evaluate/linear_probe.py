"""The linear probe: accuracy of a linear classifier on the features of a layer (paper, section 3.4).

A fifth of the fitting images is held out to select the penalty (or SGD's learning rate) of each layer, and then the
layer. The selected classifier is fitted again on all fitting images and evaluated once on the test images. Features
are standardised with mean and standard deviation of the fitted images. The paper does not state its regularisation.
"""

import functools
import operator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from igpt_ray.errors import FeatureError
from igpt_ray.evaluate.config import SgdConfig
from igpt_ray.evaluate.features import Features, Labels
from igpt_ray.evaluate.logistic import Linear, fit_lbfgs, fit_sgd, probabilities
from igpt_ray.settings import Result

L2 = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Candidate penalties: l2 / 2 * |W|^2 is added to the mean loss, on standardised features."""
HELD_OUT = 5
"""One in this many fitting images is held out."""
CHUNK = 8192
"""Images evaluated at once."""
BINS = 15
"""Bins of confidence for the calibration error."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Labelled:
    """Features and labels of images. Raises `FeatureError` if labels are missing."""

    features: Features
    """(N, C); of a masked network (N, MASKS, C). May be a memory map."""
    labels: Labels
    """(N,)"""

    def __post_init__(self) -> None:
        check_labels(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def examples(self) -> tuple[Features, Labels]:
        """Every mask of an image is an example: (N * MASKS, C), (N * MASKS,)."""
        if self.features.ndim == 2:
            return self.features, self.labels
        return self.features.reshape(-1, self.features.shape[2]), self.labels.repeat(self.features.shape[1])

    def examples_of(self, rows: Rows) -> Rows:
        masks = 1 if self.features.ndim == 2 else self.features.shape[1]
        return (rows[:, None] * masks + np.arange(masks)).ravel()


@dataclass(frozen=True)
class Method:
    """How a classifier is fitted; the candidate settings are penalties, or SGD's learning rates."""

    name: Literal["lbfgs", "sgd"] = "lbfgs"
    sgd: SgdConfig = field(default_factory=SgdConfig)
    seed: int = 0
    device: str = "cpu"

    @property
    def candidates(self) -> tuple[float, ...]:
        return L2 if self.name == "lbfgs" else self.sgd.lrs

    def fit(self, data: Labelled, rows: Rows, n_classes: int, settings: tuple[float, ...]) -> dict[float, Linear]:
        x, y = data.examples
        examples = data.examples_of(rows)
        if self.name == "lbfgs":
            return fit_lbfgs(x, y, examples, n_classes, settings, self.device)
        sgd = self.sgd.model_copy(update={"lrs": settings})
        return fit_sgd(x, y, examples, n_classes, sgd, self.seed, self.device)


@dataclass(frozen=True)
class Choice:
    """The best setting of a layer."""

    validation: float
    """Accuracy on the held-out images, in [0, 1]."""
    setting: float
    """The penalty, or the learning rate."""


def held_out(n: int, seed: int) -> tuple[Rows, Rows]:
    """The rows to fit on and the held-out rows: a function of the number of rows and the seed."""
    held = np.random.default_rng(seed).permutation(n) % HELD_OUT == 0
    return np.flatnonzero(~held), np.flatnonzero(held)


def select(data: Labelled, n_classes: int, seed: int, method: Method) -> Choice:
    """The candidate with the highest accuracy on the held-out fifth; ties take the smallest.

    Raises `FeatureError` for fewer than two classes, features that are not finite, or if every fit diverges.
    """
    _check(data)
    fit_rows, validation_rows = held_out(len(data), seed)
    fitted = method.fit(data, fit_rows, n_classes, method.candidates)
    if not fitted:
        raise FeatureError(f"SGD diverged at every learning rate of {method.candidates}: lower --sgd.lrs")
    accuracy = {
        c: evaluate_classifier(linear, data, validation_rows, n_classes).accuracy for c, linear in fitted.items()
    }
    best = max(sorted(accuracy), key=lambda c: accuracy[c])
    return Choice(accuracy[best], best)


def refit(data: Labelled, n_classes: int, setting: float, method: Method) -> Linear:
    """The classifier fitted on all fitting images with one setting."""
    _check(data)
    fitted = method.fit(data, np.arange(len(data)), n_classes, (setting,))
    if not fitted:
        raise FeatureError(f"SGD diverged at the learning rate {setting} on all images: lower --sgd.lrs")
    return fitted[setting]


def check_labels(labels: Labels) -> None:
    """Raise `FeatureError` if labels are missing."""
    missing = int((labels < 0).sum())
    if missing:
        raise FeatureError(
            f"{missing} of {len(labels)} images have no label: probe splits in which every image has a label"
        )


def check_classes(labels: Labels) -> None:
    """Raise `FeatureError` if there are fewer than two classes."""
    if len(np.unique(labels)) < 2:
        raise FeatureError("a probe needs labels of at least two classes in the split it is fitted on")


def _check(data: Labelled) -> None:
    check_classes(data.labels)
    for start in range(0, len(data), CHUNK):
        check_finite(data.features[start : start + CHUNK])


def check_finite(features: Features) -> None:
    if not np.isfinite(features).all():
        raise FeatureError("features are not finite: the release, its features or the token store is damaged")


# ------------------------------------------------------------------------------------------------ evaluation


class ClassificationReport(Result):
    accuracy: float
    """In [0, 1]."""
    top_5: float
    nats: float
    """Mean nats of the labels."""
    ece: float
    """Expected calibration error: mean |confidence - accuracy|."""


@dataclass(frozen=True)
class ClassificationSums:
    """Sums over images; those of parts of a split can be added."""

    confusion: NDArray[np.int64]
    """(classes, classes): images by true and by predicted class."""
    top_5: int
    """Images whose label is among the five most probable classes."""
    nats_sum: float
    """Of the labels under the predicted distribution."""
    bins: NDArray[np.float64]
    """(BINS, 3): number of images, sum of confidence and correct images, by confidence."""

    def __add__(self, other: "ClassificationSums") -> "ClassificationSums":
        return ClassificationSums(*map(operator.add, vars(self).values(), vars(other).values()))

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(self.confusion.trace() / self.images)

    def report(self) -> dict[str, float]:
        """The fields of `ClassificationReport`."""
        return {
            "accuracy": self.accuracy,
            "top_5": self.top_5 / self.images,
            "nats": self.nats_sum / self.images,
            "ece": float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum() / self.images),
        }


def evaluate_classifier(linear: Linear, data: Labelled, rows: Rows, n_classes: int) -> ClassificationSums:
    """Evaluate a classifier on rows of `data`, one or more, a chunk at a time."""
    sums = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        features = data.features[part]
        check_finite(features)
        sums.append(evaluate_logits(linear.logits(features), data.labels[part], n_classes))
    return functools.reduce(operator.add, sums)


def evaluate_logits(logits: Features, labels: Labels, n_classes: int) -> ClassificationSums:
    """Logits are (N, K); or (N, MASKS, K), where the masks vote."""
    p = probabilities(logits)
    scores, p = (votes(p), p.mean(1)) if p.ndim == 3 else (p, p)
    order = np.argsort(-scores, axis=1, kind="stable")
    predicted = order[:, 0]
    confidence, correct = p[np.arange(len(p)), predicted], (predicted == labels).astype(float)
    bin_ = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = np.stack([np.bincount(bin_, summand, BINS) for summand in (np.ones(len(p)), confidence, correct)], axis=1)
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    return ClassificationSums(
        confusion=confusion,
        top_5=int((order[:, :5] == labels[:, None]).any(1).sum()),
        nats_sum=float(-np.log(p[np.arange(len(p)), labels].clip(1e-300)).sum()),
        bins=bins.astype(np.float64),
    )


def votes(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Number of masks that predict each class; ties are broken by mean probability: (N, MASKS, K) -> (N, K)."""
    return np.eye(p.shape[2])[p.argmax(2)].sum(1) + p.mean(1) / 2
