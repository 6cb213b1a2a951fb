"""Few labels: random subsets, and nearest neighbours and centroids equal to scikit-learn's."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler

from igpt_ray.errors import FeatureError
from igpt_ray.evaluate.few_shot import SUBSETS, draw, few_labels, linear, mean_and_sd
from igpt_ray.evaluate.linear_probe import Labelled
from tests.evaluate.test_linear_probe import clusters

CLASSES = ["ant", "bee", "cat", "dog"]


def test_a_subset_has_k_distinct_images_of_every_class_by_its_seed() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 200)
    rows = draw(labels, 7, CLASSES, (0, 0))
    assert np.bincount(labels[rows]).tolist() == [7] * 4
    assert len(set(rows.tolist())) == 28
    assert (draw(labels, 7, CLASSES, (0, 0)) == rows).all()
    assert (draw(labels, 7, CLASSES, (0, 1)) != rows).any()
    assert (draw(labels, 7, CLASSES, (1, 0)) != rows).any()


def test_neighbours_and_centroids_equal_scikit_learn_s() -> None:
    """Including the standardisation, which uses the subset only."""
    fit, test = clusters(200, 12, 4, 2.0, seed=1), clusters(1500, 12, 4, 2.0, seed=2)
    found = few_labels(fit, test, 10, CLASSES, seed=5)
    for subset in range(SUBSETS):
        rows = draw(fit.labels, 10, CLASSES, (5, subset))
        scaler = StandardScaler().fit(fit.features[rows])
        known, asked = scaler.transform(fit.features[rows]), scaler.transform(test.features)
        neighbours = KNeighborsClassifier(1).fit(known, fit.labels[rows])
        assert found["nearest_neighbour"][subset] == pytest.approx(neighbours.score(asked, test.labels), abs=2e-3)
        centroids = NearestCentroid().fit(known, fit.labels[rows])
        assert found["nearest_centroid"][subset] == pytest.approx(centroids.score(asked, test.labels), abs=2e-3)


def test_accuracy_grows_with_labels_and_is_chance_on_noise() -> None:
    """It must not be measured on fitted images, nor test labels leak."""
    fit, test = clusters(400, 12, 4, 2.0, seed=3), clusters(1000, 12, 4, 2.0, seed=4)
    few, many = (few_labels(fit, test, k, CLASSES, seed=0)["linear"] for k in (2, 50))
    assert np.mean(many) > np.mean(few) + 0.05
    shuffled = Labelled(test.features, np.random.default_rng(0).permutation(test.labels))
    for name, runs in few_labels(fit, shuffled, 50, CLASSES, seed=0).items():
        assert abs(np.mean(runs) - 0.25) < 0.05, name


def test_only_the_subset_is_used() -> None:
    """Neither standardisation nor the choice of the penalty may use other images."""
    fit, test = clusters(300, 12, 4, 2.0, seed=5), clusters(300, 12, 4, 2.0, seed=6)
    drawn = np.unique(np.concatenate([draw(fit.labels, 5, CLASSES, (0, subset)) for subset in range(SUBSETS)]))
    spoilt = np.full_like(fit.features, np.nan)
    spoilt[drawn] = fit.features[drawn]
    assert few_labels(Labelled(spoilt, fit.labels), test, 5, CLASSES, 0) == few_labels(fit, test, 5, CLASSES, 0)


def test_predictions_under_masks_vote() -> None:
    fit, test = clusters(200, 12, 4, 0.3, seed=7), clusters(200, 12, 4, 0.3, seed=8)
    masked = [Labelled(data.features[:, None].repeat(5, 1), data.labels) for data in (fit, test)]
    for name, runs in few_labels(*masked, 5, CLASSES, 0).items():
        assert np.mean(runs) > 0.95, name


def test_the_error_names_a_class_with_too_few_images() -> None:
    labels = np.repeat([0, 1, 2, 3], [9, 9, 3, 9])
    with pytest.raises(FeatureError, match="the class 'cat' has 3 images to fit on, fewer than the 4 of --low-data"):
        draw(labels, 4, CLASSES, (0, 0))


def test_one_label_per_class_suffices_for_a_fit() -> None:
    """Without folds, the penalty is the weakest."""
    fit, test = clusters(40, 12, 4, 0.2, seed=9), clusters(100, 12, 4, 0.2, seed=10)
    assert linear(fit, draw(fit.labels, 1, CLASSES, (0, 0)), test, 4) > 0.9


def test_spread_is_mean_and_sample_deviation() -> None:
    assert mean_and_sd([0.5, 0.7]).line() == {
        "mean": 0.6,
        "sd": pytest.approx(np.std([0.5, 0.7], ddof=1)),
        "runs": [0.5, 0.7],
    }
