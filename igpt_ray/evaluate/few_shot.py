"""Few labels per class: linear probe, nearest neighbour and nearest centroid on five random subsets.

The paper uses 4, 25 and 400 labels per class (section 4.5). Only the images of a subset are used for fitting: they
standardise the features, and cross-validation within the subset selects the penalty.
"""

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from igpt_ray.errors import FeatureError
from igpt_ray.evaluate.features import Features, Labels
from igpt_ray.evaluate.linear_probe import Labelled, Method, Rows, check_finite, evaluate_classifier
from igpt_ray.evaluate.logistic import moments
from igpt_ray.settings import Result

SUBSETS = 5
FOLDS = 4
METHOD = Method("lbfgs")
L2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Candidate penalties."""
CHUNK = 1024
"""Test images whose distances to all labelled images are in memory at once."""


def few_labels(fit: Labelled, test: Labelled, k: int, classes: Sequence[str], seed: int) -> dict[str, list[float]]:
    """Test accuracy in [0, 1] of each classifier on each subset with k labels per class.

    Raises `FeatureError` if a class has fewer images, or features are not finite.
    """
    accuracies: dict[str, list[float]] = {"linear": [], "nearest_neighbour": [], "nearest_centroid": []}
    check_finite(test.features)
    for subset in range(SUBSETS):
        rows = draw(fit.labels, k, classes, (seed, subset))
        check_finite(fit.features[rows])
        accuracies["linear"].append(linear(fit, rows, test, len(classes)))
        chosen = _mean_over_masks(fit.features[rows])
        mean, deviation = moments(chosen, np.arange(len(rows)))
        labelled = (chosen - mean) / deviation
        queries = (_mean_over_masks(test.features) - mean) / deviation
        labels = fit.labels[rows]
        accuracies["nearest_neighbour"].append(float((labels[nearest(labelled, queries)] == test.labels).mean()))
        centroids = np.stack([labelled[labels == c].mean(0) for c in range(len(classes))])
        accuracies["nearest_centroid"].append(float((nearest(centroids, queries) == test.labels).mean()))
    return accuracies


def draw(labels: Labels, k: int, classes: Sequence[str], seed: tuple[int, int]) -> Rows:
    """Random rows, k of each class, sorted by class. Raises `FeatureError` if a class has fewer."""
    rng = np.random.default_rng(seed)
    drawn = []
    for c, name in enumerate(classes):
        rows = np.flatnonzero(labels == c)
        if len(rows) < k:
            raise FeatureError(
                f"the class {name!r} has {len(rows)} images to fit on, fewer than the {k} of --low-data: lower it"
            )
        drawn.append(rng.choice(rows, k, replace=False))
    return np.concatenate(drawn)


def linear(fit: Labelled, rows: Rows, test: Labelled, n_classes: int) -> float:
    """Test accuracy of logistic regression on the rows of a subset in the order of `draw`."""
    k = len(rows) // n_classes
    folds = min(FOLDS, k) if k > 1 else 0  # one label per class cannot be split into folds: the weakest penalty
    fold = np.tile(np.arange(k) % max(1, folds), n_classes)  # every fold has equally many images of each class
    correct = dict.fromkeys(L2, 0.0)
    for f in range(folds):
        for l2, classifier in METHOD.fit(fit, rows[fold != f], n_classes, L2).items():
            correct[l2] += evaluate_classifier(classifier, fit, rows[fold == f], n_classes).confusion.trace()
    best = max(sorted(correct), key=lambda l2: correct[l2])
    classifier = METHOD.fit(fit, rows, n_classes, (best,))[best]
    return evaluate_classifier(classifier, test, np.arange(len(test)), n_classes).accuracy


def _mean_over_masks(features: Features) -> Features:
    """(N, C) or (N, MASKS, C) -> (N, C)."""
    return features if features.ndim == 2 else features.mean(1)


def nearest(references: Features, queries: Features) -> NDArray[np.int64]:
    """The row of `references` with the smallest Euclidean distance to each query."""
    squares = np.square(references).sum(1)
    parts = (queries[start : start + CHUNK] for start in range(0, len(queries), CHUNK))
    return np.concatenate([(squares - 2 * part @ references.T).argmin(1) for part in parts])


class Runs(Result):
    """Accuracies on the random subsets."""

    mean: float
    sd: float
    """Sample standard deviation."""
    runs: list[float]


def mean_and_sd(runs: list[float]) -> Runs:
    return Runs(mean=statistics.mean(runs), sd=statistics.stdev(runs), runs=runs)
