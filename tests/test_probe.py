"""The linear probe: as good a fit as scikit-learn's, chosen without a look at the test split."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from igpt_ray.errors import TokenStoreError
from igpt_ray.probe import L2, Features, Labelled, Labels, fit_logistic, probe, vote


def clusters(n: int, d: int, classes: int, spread: float, seed: int) -> Labelled:
    """Gaussian clouds around one centre a class."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    labels = rng.integers(0, classes, n)
    features = centres[labels] + spread * rng.normal(size=(n, d))
    return Labelled(features.astype(np.float32), labels)


def loss(weight: NDArray[np.floating], bias: NDArray[np.floating], x: Features, y: Labels, l2: float) -> float:
    logits = x.astype(np.float64) @ weight.astype(np.float64).T + bias
    nats = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]
    return float(nats.mean() + l2 / 2 * (weight.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("l2", L2)
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_a_fit_is_as_good_as_scikit_learns(l2: float, spread: float) -> None:
    """Stopped too early, a penalised bias, or a penalty that grows with the number of images."""
    data = clusters(300, 20, 5, spread, seed=0)
    weight, bias = fit_logistic(data.features, data.labels, 5, l2)
    reference = LogisticRegression(C=1 / (l2 * 300), tol=1e-10, max_iter=10_000).fit(data.features, data.labels)
    ours = loss(weight, bias, data.features, data.labels, l2)
    theirs = loss(reference.coef_, reference.intercept_, data.features, data.labels, l2)
    assert ours <= theirs * (1 + 1e-5)  # no weights can be below the optimum; scikit-learn's stop a little above it


def test_well_separated_classes_are_told_apart() -> None:
    """Labels and features that have lost their order on the way."""
    found = probe(clusters(400, 16, 4, 0.2, seed=1), clusters(200, 16, 4, 0.2, seed=2), 4, seed=0)
    assert (found["validation"], found["test"]) == (1, 1)
    assert found["l2"] in L2


def test_noise_is_told_apart_no_better_than_by_chance() -> None:
    """Accuracy on the images it was fitted on."""
    rng = np.random.default_rng(3)
    fit, test = (Labelled(rng.normal(size=(n, 60)).astype(np.float32), rng.integers(0, 4, n)) for n in (300, 2000))
    found = probe(fit, test, 4, seed=0)
    assert 0.2 < found["test"] < 0.3
    assert found["validation"] < 0.5


def test_scale_and_offset_of_a_feature_do_not_matter() -> None:
    """Without standardising, the penalty would choose the layer by the size of its numbers."""
    fit, test = clusters(300, 16, 4, 2.0, seed=4), clusters(300, 16, 4, 2.0, seed=5)
    scales = np.logspace(-2, 3, 16).astype(np.float32)

    def stretched(data: Labelled) -> Labelled:
        return Labelled(data.features * scales + 5, data.labels)

    plain, other = probe(fit, test, 4, seed=0), probe(stretched(fit), stretched(test), 4, seed=0)
    assert other["test"] == pytest.approx(plain["test"], abs=0.02)


def test_a_constant_feature_is_harmless() -> None:
    """A division by a deviation of zero."""
    fit, test = (Labelled(np.pad(c.features, ((0, 0), (0, 1))), c.labels) for c in (clusters(200, 8, 3, 0.3, 6),) * 2)
    assert probe(fit, test, 3, seed=0)["test"] == 1


def test_the_test_split_chooses_nothing() -> None:
    """A penalty chosen on the test split is the commonest way to report too much."""
    fit, test = clusters(300, 16, 4, 3.0, seed=7), clusters(300, 16, 4, 3.0, seed=8)
    shuffled = Labelled(test.features, np.random.default_rng(0).permutation(test.labels))
    first, second = probe(fit, test, 4, seed=0), probe(fit, shuffled, 4, seed=0)
    assert (first["l2"], first["validation"]) == (second["l2"], second["validation"])
    assert first["test"] > second["test"]
    assert probe(fit, test, 4, seed=0) == first


def test_the_last_fit_is_on_all_images() -> None:
    """The held-out fifth is too good to waste: here it holds, under some seeds, the only image of a class."""
    data = clusters(40, 8, 3, 0.1, seed=11)
    one_more = Labelled(
        np.concatenate([data.features, np.full((1, 8), 9, np.float32)]), np.concatenate([data.labels, [3]])
    )
    like_it = Labelled(np.full((5, 8), 9, np.float32), np.full(5, 3))
    assert [probe(one_more, like_it, 4, seed=seed)["test"] for seed in range(4, 7)] == [1] * 3


def test_a_class_that_is_absent_from_the_fit_is_allowed() -> None:
    """A small sample of many classes rarely has all of them."""
    data = clusters(200, 8, 3, 0.3, seed=9)
    assert probe(data, data, 10, seed=0)["test"] == 1


def test_most_masks_decide_and_of_equals_the_likelier() -> None:
    """Logits that are averaged: one mask that is very sure would outvote four."""
    sure, weak = np.array([9.0, 0, 0]), np.array([0, 1.0, 0])
    four_to_one = np.stack([sure, weak, weak, weak, weak])
    two_to_two = np.stack([sure, sure, weak, weak, np.array([0, 0, 1.0])])
    assert vote(np.stack([four_to_one, two_to_two, two_to_two[::-1]]).astype(np.float32)).tolist() == [1, 0, 0]


def test_looks_at_an_image_are_examples_of_it_and_vote() -> None:
    """Labels repeated in another order than features; one look taken for all."""
    data, rng = clusters(300, 8, 3, 0.3, seed=12), np.random.default_rng(0)
    same = Labelled(data.features[:, None].repeat(5, 1), data.labels)
    assert probe(same, same, 3, seed=0)["test"] == pytest.approx(probe(data, data, 3, seed=0)["test"], abs=0.01)
    noise = rng.normal(0, 2, (300, 5, 8)).astype(np.float32)
    noisy = Labelled(same.features + noise, data.labels)
    one = Labelled(noisy.features[:, 0], data.labels)
    assert probe(noisy, noisy, 3, seed=0)["test"] > probe(one, one, 3, seed=0)["test"] + 0.05


def test_a_single_class_is_refused() -> None:
    """Accuracy 1.0, and nothing learnt."""
    one = Labelled(np.zeros((10, 4), np.float32), np.zeros(10, np.int64))
    with pytest.raises(TokenStoreError, match="at least two classes"):
        probe(one, one, 2, seed=0)


@pytest.mark.parametrize("which", ["fit", "test"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(which: str, value: float) -> None:
    """L-BFGS stops at the first NaN and returns zeros: accuracy by chance, without a word."""
    good = clusters(50, 4, 2, 1.0, seed=10)
    bad = Labelled(good.features.copy(), good.labels)
    bad.features[3, 1] = value
    with pytest.raises(TokenStoreError, match="not finite"):
        probe(*((bad, good) if which == "fit" else (good, bad)), 2, seed=0)
