"""The linear probe: selected without the test split, and evaluated by sums over its images."""

import numpy as np
import pytest
import torch
from sklearn import metrics

from igpt_ray.errors import FeatureError
from igpt_ray.evaluate.config import SgdConfig
from igpt_ray.evaluate.linear_probe import (
    L2,
    Labelled,
    Method,
    evaluate_classifier,
    evaluate_logits,
    refit,
    select,
    votes,
)


def clusters(n: int, d: int, classes: int, actor_map: float, seed: int) -> Labelled:
    """Gaussian clusters, one centre per class."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    labels = rng.integers(0, classes, n)
    features = centres[labels] + actor_map * rng.normal(size=(n, d))
    return Labelled(features.astype(np.float32), labels)


def probed(fit: Labelled, test: Labelled, n_classes: int, seed: int, method: Method | None = None) -> dict[str, float]:
    """The steps of the flow for one layer."""
    method = method or Method()
    choice = select(fit, n_classes, seed, method)
    linear = refit(fit, n_classes, choice.setting, method)
    sums = evaluate_classifier(linear, test, np.arange(len(test)), n_classes)
    report, confusion = sums.report(), sums.confusion
    assert confusion.sum() == len(test)
    return {"validation": choice.validation, "test": report["accuracy"], "l2": choice.setting, **report}


def test_well_separated_classes_are_classified_correctly(device: torch.device) -> None:
    """Labels and features have the same order."""
    method = Method(device=str(device))
    found = probed(clusters(400, 16, 4, 0.2, seed=1), clusters(200, 16, 4, 0.2, seed=2), 4, seed=0, method=method)
    assert (found["validation"], found["test"]) == (1, 1)
    assert found["l2"] in L2


def test_accuracy_on_noise_is_chance() -> None:
    """It is not measured on the fitted images."""
    rng = np.random.default_rng(3)
    fit, test = (Labelled(rng.normal(size=(n, 60)).astype(np.float32), rng.integers(0, 4, n)) for n in (300, 2000))
    found = probed(fit, test, 4, seed=0)
    assert 0.2 < found["test"] < 0.3
    assert found["validation"] < 0.5


def test_scale_and_offset_of_a_feature_do_not_matter() -> None:
    """Without standardisation, the penalty would favour layers with large features."""
    fit, test = clusters(300, 16, 4, 2.0, seed=4), clusters(300, 16, 4, 2.0, seed=5)
    scales = np.logspace(-2, 3, 16).astype(np.float32)

    def stretched(data: Labelled) -> Labelled:
        return Labelled(data.features * scales + 5, data.labels)

    plain, other = probed(fit, test, 4, seed=0), probed(stretched(fit), stretched(test), 4, seed=0)
    assert other["test"] == pytest.approx(plain["test"], abs=0.02)


def test_a_constant_feature_is_harmless() -> None:
    """Its deviation is zero."""
    fit, test = (Labelled(np.pad(c.features, ((0, 0), (0, 1))), c.labels) for c in (clusters(200, 8, 3, 0.3, 6),) * 2)
    assert probed(fit, test, 3, seed=0)["test"] == 1


def test_the_test_split_selects_nothing() -> None:
    """A penalty selected on the test split would inflate the accuracy."""
    fit, test = clusters(300, 16, 4, 3.0, seed=7), clusters(300, 16, 4, 3.0, seed=8)
    shuffled = Labelled(test.features, np.random.default_rng(0).permutation(test.labels))
    first, second = probed(fit, test, 4, seed=0), probed(fit, shuffled, 4, seed=0)
    assert (first["l2"], first["validation"]) == (second["l2"], second["validation"])
    assert first["test"] > second["test"]
    assert probed(fit, test, 4, seed=0) == first


def test_the_last_fit_is_on_all_images() -> None:
    """With some seeds here, the held-out fifth has the only image of a class."""
    data = clusters(40, 8, 3, 0.1, seed=11)
    one_more = Labelled(
        np.concatenate([data.features, np.full((1, 8), 9, np.float32)]), np.concatenate([data.labels, [3]])
    )
    like_it = Labelled(np.full((5, 8), 9, np.float32), np.full(5, 3))
    assert [probed(one_more, like_it, 4, seed=seed)["test"] for seed in range(4, 7)] == [1] * 3


def test_a_class_that_is_absent_from_the_fit_is_allowed() -> None:
    """A small sample may lack classes."""
    data = clusters(200, 8, 3, 0.3, seed=9)
    assert probed(data, data, 10, seed=0)["test"] == 1


def test_the_majority_of_masks_decides_and_ties_go_to_the_likelier() -> None:
    """With averaged logits, one confident mask would outweigh four."""
    sure, weak = np.array([9.0, 0, 0]), np.array([0, 1.0, 0])
    four_to_one = np.stack([sure, weak, weak, weak, weak])
    two_to_two = np.stack([sure, sure, weak, weak, np.array([0, 0, 1.0])])
    logits = np.stack([four_to_one, two_to_two, two_to_two[::-1]])
    p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    assert votes(p).argmax(1).tolist() == [1, 0, 0]
    assert evaluate_logits(logits.astype(np.float32), np.array([1, 0, 0]), 3).accuracy == 1


def test_each_mask_of_an_image_is_an_example_and_all_vote() -> None:
    """Labels are repeated in the order of the features."""
    data, rng = clusters(300, 8, 3, 0.3, seed=12), np.random.default_rng(0)
    same = Labelled(data.features[:, None].repeat(5, 1), data.labels)
    assert probed(same, same, 3, seed=0)["test"] == pytest.approx(probed(data, data, 3, seed=0)["test"], abs=0.01)
    noise = rng.normal(0, 2, (300, 5, 8)).astype(np.float32)
    noisy = Labelled(same.features + noise, data.labels)
    one = Labelled(noisy.features[:, 0], data.labels)
    assert probed(noisy, noisy, 3, seed=0)["test"] > probed(one, one, 3, seed=0)["test"] + 0.05


def test_a_single_class_is_an_error() -> None:
    """Its accuracy of 1.0 would be meaningless."""
    one = Labelled(np.zeros((10, 4), np.float32), np.zeros(10, np.int64))
    with pytest.raises(FeatureError, match="at least two classes"):
        probed(one, one, 2, seed=0)


@pytest.mark.parametrize("which", ["fit", "test"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_an_error(which: str, value: float) -> None:
    """L-BFGS would stop at the first NaN and return zeros."""
    good = clusters(50, 4, 2, 1.0, seed=10)
    bad = Labelled(good.features.copy(), good.labels)
    bad.features[3, 1] = value
    with pytest.raises(FeatureError, match="not finite"):
        probed(*((bad, good) if which == "fit" else (good, bad)), 2, seed=0)


# ------------------------------------------------------------------------------------------------ measures


def test_the_metrics_equal_scikit_learn_s() -> None:
    """Covers top-5 accuracy, the orientation of the confusion matrix, and the nats of the true class."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 2, (500, 8)).astype(np.float32), rng.integers(0, 8, 500)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    found = evaluate_logits(logits, labels, 8)
    report = found.report()
    assert report["accuracy"] == metrics.accuracy_score(labels, p.argmax(1))
    assert report["top_5"] == metrics.top_k_accuracy_score(labels, p, k=5)
    assert report["nats"] == pytest.approx(metrics.log_loss(labels, p))
    assert (found.confusion == metrics.confusion_matrix(labels, p.argmax(1))).all()


def test_metrics_of_parts_can_be_summed() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(0, 2, (300, 4)).astype(np.float32), rng.integers(0, 4, 300)
    whole = evaluate_logits(logits, labels, 4).report()
    parts = evaluate_logits(logits[:7], labels[:7], 4) + evaluate_logits(logits[7:], labels[7:], 4)
    assert parts.report() == pytest.approx(whole)


def test_the_calibration_error_is_the_gap_of_confidence_and_accuracy() -> None:
    """Labels drawn from the predictions are calibrated; confidence 0.9 with accuracy 0.5 is an error of 0.4."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1.5, (100_000, 3)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((len(p), 1)) > p.cumsum(1)).sum(1).clip(max=2)
    assert evaluate_logits(logits, labels, 3).report()["ece"] < 0.01
    sure = np.tile(np.log(np.float32([0.9, 0.1])), (1000, 1))
    assert evaluate_logits(sure, np.arange(1000) % 2, 2).report()["ece"] == pytest.approx(0.4, abs=1e-6)


# ------------------------------------------------------------------------------------------------ SGD


def test_sgd_selects_and_refits_like_l_bfgs(device: torch.device) -> None:
    """Five masks per image, streamed from a file; the learning rate is selected."""
    data, rng = clusters(300, 8, 3, 0.3, seed=12), np.random.default_rng(0)
    noisy = Labelled(
        (data.features[:, None].repeat(5, 1) + rng.normal(0, 2, (300, 5, 8))).astype(np.float32), data.labels
    )
    method = Method("sgd", SgdConfig(steps=500, lrs=(1, 0.1, 1e-6)), device=str(device))
    by_sgd = probed(noisy, noisy, 3, seed=0, method=method)
    assert by_sgd["l2"] != 1e-6
    assert by_sgd["test"] >= probed(noisy, noisy, 3, seed=0)["test"] - 0.01


def test_images_without_a_label_are_refused() -> None:
    """-1 would be the last class."""
    with pytest.raises(FeatureError, match="2 of 3 images have no label: probe splits in which"):
        Labelled(np.zeros((3, 4), np.float32), np.array([0, -1, -1]))
