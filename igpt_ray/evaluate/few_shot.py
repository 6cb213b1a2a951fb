"""Few labels a class: the probe beside the classifiers that learn nothing, on five subsets drawn by a seed.

The paper's are 4, 25 and 400 labels a class (section 4.5). Of the fitting images only a subset's is ever looked at: it
standardises the features, and chooses the penalty by dividing itself into folds.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from igpt_ray.errors import FeatureError
from igpt_ray.evaluate.features import Features, Labels
from igpt_ray.evaluate.linear_probe import Labelled, Rows, check_finite, evaluate_classifier
from igpt_ray.evaluate.logistic import Linear, fit_lbfgs, moments

SUBSETS = 5
FOLDS = 4
L2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Penalties tried."""
CHUNK = 1024
"""Test images whose distances to all labelled ones are held at once."""


def few_labels(fit: Labelled, test: Labelled, k: int, classes: Sequence[str], seed: int) -> dict[str, list[float]]:
    """Test accuracy in [0, 1] with k labels a class, of each classifier on each subset.

    Raises `FeatureError` if a class has fewer images, or features are not finite.
    """
    found: dict[str, list[float]] = {"linear": [], "nearest_neighbour": [], "nearest_centroid": []}
    check_finite(test.features)
    for subset in range(SUBSETS):
        rows = draw(fit.labels, k, classes, (seed, subset))
        check_finite(fit.features[rows])
        found["linear"].append(linear(fit, rows, test, len(classes)))
        mean, deviation = moments(_one_look(fit.features[rows]), np.arange(len(rows)))
        known = (_one_look(fit.features[rows]) - mean) / deviation
        asked = (_one_look(test.features) - mean) / deviation
        labels = fit.labels[rows]
        found["nearest_neighbour"].append(share(labels[nearest(known, asked)], test.labels))
        centroids = np.stack([known[labels == c].mean(0) for c in range(len(classes))])
        found["nearest_centroid"].append(share(nearest(centroids, asked), test.labels))
    return found


def draw(labels: Labels, k: int, classes: Sequence[str], seed: tuple[int, int]) -> Rows:
    """k rows of each class, class by class."""
    rng = np.random.default_rng(seed)
    drawn = []
    for c, name in enumerate(classes):
        rows = np.flatnonzero(labels == c)
        if len(rows) < k:
            raise FeatureError(
                f"the class {name!r} has {len(rows)} images to fit on, fewer than the {k} asked for: lower --low-data"
            )
        drawn.append(rng.choice(rows, k, replace=False))
    return np.concatenate(drawn)


def linear(fit: Labelled, rows: Rows, test: Labelled, n_classes: int) -> float:
    """Accuracy of logistic regression on the rows of a subset, which `draw` has put class by class."""
    k = len(rows) // n_classes
    folds = min(FOLDS, k) if k > 1 else 0  # a single label leaves nothing to choose by: the weakest penalty
    fold = np.tile(np.arange(k) % max(1, folds), n_classes)  # each has as many of every class
    hits = dict.fromkeys(L2, 0.0)
    for f in range(folds):
        fitted = _fit(fit, rows[fold != f], n_classes, L2)
        for l2, classifier in fitted.items():
            hits[l2] += evaluate_classifier(classifier, fit, rows[fold == f], n_classes).confusion.trace()
    best = max(sorted(hits), key=lambda l2: hits[l2])
    return evaluate_classifier(
        _fit(fit, rows, n_classes, (best,))[best], test, np.arange(len(test)), n_classes
    ).accuracy


def _fit(fit: Labelled, rows: Rows, n_classes: int, l2s: Sequence[float]) -> dict[float, Linear]:
    x, y = fit.examples
    return fit_lbfgs(x, y, fit.examples_of(rows), n_classes, l2s)


def _one_look(features: Features) -> Features:
    """Of several masks, the mean."""
    return features if features.ndim == 2 else features.mean(1)


def nearest(known: Features, asked: Features) -> NDArray[np.int64]:
    """The row of `known` that lies nearest to each of `asked`, by Euclidean distance."""
    squares = np.square(known).sum(1)
    parts = (asked[start : start + CHUNK] for start in range(0, len(asked), CHUNK))
    return np.concatenate([(squares - 2 * part @ known.T).argmin(1) for part in parts])


def share(chosen: Labels, labels: Labels) -> float:
    return float((chosen == labels).mean())


def spread_of(runs: list[float]) -> dict[str, object]:
    """Mean and standard deviation (of the sample) over subsets."""
    mean = sum(runs) / len(runs)
    return {"mean": mean, "sd": math.sqrt(sum((run - mean) ** 2 for run in runs) / (len(runs) - 1)), "runs": runs}
