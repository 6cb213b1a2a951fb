"""Likelihood equals a direct computation, and count models reach the entropy of synthetic data."""

import math

import numpy as np
import pytest
import torch
from conftest import random_model, random_tokens
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from igpt_ray.data.token_store import Tokens
from igpt_ray.evaluate.likelihood import (
    Evaluation,
    Likelihood,
    auroc,
    count_models,
    heat_map,
    image_nats,
    masked_nats,
    nats_by_image_and_position,
)
from igpt_ray.model import losses

# ------------------------------------------------------------------------------------------------ a network's nats


def test_the_nats_of_an_image_are_minus_the_log_of_its_probability(device: torch.device) -> None:
    """A sum over all pixels, including the first."""
    model = random_model(device=device)
    x = random_tokens(model, 7)
    p = torch.softmax(model(x).double(), -1).gather(-1, x[..., None])[..., 0]
    nats = image_nats(model, x.cpu().numpy().astype(np.uint16), batch_size=4)
    np.testing.assert_allclose(nats, -p.log().sum(1).cpu(), rtol=1e-5)
    assert nats.dtype == np.float64


def test_results_do_not_depend_on_the_batch_size(device: torch.device) -> None:
    """The last, smaller batch has the right weight."""
    model = random_model(device=device)
    x = random_tokens(model, 11).cpu().numpy().astype(np.uint16)
    reference = image_nats(model, x, 11)
    for batch_size in (1, 3, 10, 64):
        np.testing.assert_allclose(image_nats(model, x, batch_size), reference, rtol=1e-5)
    assert image_nats(model, x[:0], 4).shape == (0,)


def test_a_masked_network_is_evaluated_with_five_masks_per_image(device: torch.device) -> None:
    """The masks depend on the image, not on the batch."""
    model = random_model(std=0.15, objective="masked", device=device)
    x = random_tokens(model, 7)
    keys = [f"cat/{i}.png" for i in range(7)]
    nats = masked_nats(model, x.cpu().numpy().astype(np.uint16), keys, batch_size=3)
    for i in (0, 6):
        one = x[i : i + 1]
        keeps = [losses.visible_masks_of_keys(keys[i : i + 1], mask, 16).to(device) for mask in range(5)]
        direct = [losses.masked_pixel(model(one, keep), one, keep).item() for keep in keeps]
        assert nats[i] == pytest.approx(np.mean(direct), rel=1e-5)
    alone = masked_nats(model, x[4:5].cpu().numpy().astype(np.uint16), keys[4:5], batch_size=3)
    assert alone[0] == pytest.approx(nats[4], rel=1e-5)


def test_sums_of_parts_equal_the_sums_of_all() -> None:
    """Shards of different sizes have the right weight."""
    nats = np.random.default_rng(0).uniform(20, 40, 100)
    whole = Likelihood.of(nats, 16).report()
    for cuts in ([50], [1, 2], [10, 99]):
        parts = [Likelihood.of(part, 16) for part in np.split(nats, cuts)]
        assert sum(parts[1:], parts[0]).report() == pytest.approx(whole)


def test_a_report_is_per_token_with_its_standard_error() -> None:
    """Bits are nats over ln 2, and the error is of the mean."""
    nats = np.random.default_rng(1).normal(30, 3, 400)
    report = Likelihood.of(nats, 16).report()
    assert report["nats_per_token"] == pytest.approx(nats.mean() / 16)
    assert report["bits_per_pixel"] == pytest.approx(nats.mean() / 16 / math.log(2))
    assert report["standard_error"] == pytest.approx(nats.std() / math.sqrt(400) / 16)
    assert (report["images"], report["tokens"]) == (400, 6400)


def test_a_single_image_has_no_standard_error() -> None:
    """The variance must not be negative by rounding."""
    assert Likelihood.of(np.array([math.pi * 1e5]), 16).report()["standard_error"] == 0
    assert math.isfinite(Likelihood.of(np.full(3, math.pi * 1e5), 16).report()["standard_error"])


def test_images_of_two_sizes_are_not_added() -> None:
    """Nats per token of 32x32 and 48x48 images are not comparable."""
    with pytest.raises(AssertionError, match="different sizes"):
        Likelihood.of(np.ones(2), 16) + Likelihood.of(np.ones(2), 64)


# ------------------------------------------------------------------------------------------------ where and whom


def test_sums_over_images_equal_sums_over_positions(device: torch.device) -> None:
    """Positions are summed over all batches."""
    model = random_model(device=device)
    x = random_tokens(model, 11)
    by_image, by_position = nats_by_image_and_position(model, x.cpu().numpy().astype(np.uint16), batch_size=4)
    direct = losses.next_pixel(model(x), x).double().cpu().numpy()
    np.testing.assert_allclose(by_image, direct.sum(1), rtol=1e-5)
    np.testing.assert_allclose(by_position, direct.sum(0), rtol=1e-5)


def test_nats_by_class_and_ranking_belong_to_the_right_images() -> None:
    """Labels and nats have the same order after shards are joined; a class may have no images."""
    nats = np.random.default_rng(0).uniform(20, 40, 100)
    labels = np.arange(100) % 3
    keys = [f"{i}.png" for i in range(100)]
    parts = [
        Evaluation(keys[:30], labels[:30], nats[:30], np.ones(16)),
        Evaluation(keys[30:], labels[30:], nats[30:], np.ones(16)),
    ]
    whole = Evaluation.concatenate(parts)
    by_class = whole.by_class(["a", "b", "c", "nobody"])
    assert list(by_class) == ["a", "b", "c"]
    assert by_class["b"]["nats_per_token"] == pytest.approx(nats[labels == 1].mean() / 16)
    assert whole.by_position.tolist() == [2] * 16
    ranking = whole.ranking()
    assert ranking["most_likely"][0] == {"key": f"{nats.argmin()}.png", "nats_per_token": nats.min() / 16}
    assert ranking["least_likely"][0] == {"key": f"{nats.argmax()}.png", "nats_per_token": nats.max() / 16}
    assert len(ranking["least_likely"]) == 20


def test_auroc_equals_scikit_learn_s_with_ties() -> None:
    """The direction is right, and ties count one half."""
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 20, 300) / 2, rng.integers(5, 25, 200) / 2
    expected = roc_auc_score(np.repeat([0, 1], [300, 200]), np.concatenate([inside, outside]))
    assert auroc(inside, outside) == pytest.approx(expected)
    assert auroc(inside, inside) == 0.5
    assert auroc(inside, inside + 100) == 1


def test_a_heat_map_is_brightest_at_the_maximum() -> None:
    """Rows and columns are in the right order."""
    values = np.zeros(16)
    values[[2, 7]] = 1, 4  # row 0, column 2, and row 1, column 3
    picture = heat_map(values, n_px=4, scale=3).astype(int).sum(2)
    assert picture.shape == (12, 12)
    assert (picture[3:6, 9:12] == picture.max()).all()
    assert (picture[:3, 6:9] > 0).all()
    assert (picture[6:] == 0).all()


# ------------------------------------------------------------------------------------------------ count models

V, PX = 6, 8
T = PX * PX


def entropy(p: NDArray[np.float64]) -> float:
    return float(-(p * np.log(p)).sum(-1).mean())


def by_position(rng: np.random.Generator, n: int, p: NDArray[np.float64]) -> Tokens:
    """Random images whose positions have different distributions."""
    return np.stack([rng.choice(V, n, p=p[t]) for t in range(T)], axis=1).astype(np.uint16)


def test_independent_pixels_reach_the_entropy_of_their_position() -> None:
    """Counts are per position; context does not help here."""
    rng = np.random.default_rng(2)
    p = rng.dirichlet(np.full(V, 0.5) + 0.05, T).clip(1e-3)
    p /= p.sum(1, keepdims=True)
    found = count_models(by_position(rng, 4000, p), by_position(rng, 1000, p), PX, V)
    assert found["unigram_by_position"] == pytest.approx(entropy(p), rel=0.02)
    mixed = entropy(p.mean(0)[None])
    assert mixed > entropy(p) + 0.2
    assert found["bigram_previous_pixel"] == pytest.approx(mixed, rel=0.02)


def test_a_markov_chain_reaches_the_entropy_of_its_transitions() -> None:
    """Contexts precede the pixel in the same image, and "no previous pixel" is not a colour."""
    rng = np.random.default_rng(3)
    step = rng.dirichlet(np.full(V, 0.4), V).clip(1e-3)
    step /= step.sum(1, keepdims=True)

    def draw(n: int) -> Tokens:
        x = np.empty((n, T), np.uint16)
        x[:, 0] = V - 1
        for t in range(1, T):
            x[:, t] = (rng.random((n, 1)) > step[x[:, t - 1]].cumsum(1)).sum(1).clip(max=V - 1)
        return x

    fit, test = draw(3000), draw(800)
    expected = -np.log(step[test[:, :-1], test[:, 1:]]).sum()  # the first pixel is always the same, and costs nothing
    found = count_models(fit, test, PX, V)
    assert found["bigram_previous_pixel"] == pytest.approx(expected / test.size, rel=0.01)
    assert found["unigram_by_position"] > 1.2 * found["bigram_previous_pixel"]


def test_a_two_dimensional_pattern_costs_only_its_border() -> None:
    """Each pixel is the sum of its left and upper neighbours."""
    rng = np.random.default_rng(4)

    def draw(n: int) -> Tokens:
        grid = rng.integers(0, V, (n, PX, PX)).astype(np.uint16)
        for i in range(1, PX):
            for j in range(1, PX):
                grid[:, i, j] = (grid[:, i - 1, j] + grid[:, i, j - 1]) % V
        return grid.reshape(n, T)

    found = count_models(draw(2000), draw(500), PX, V)
    border = (2 * PX - 1) / T * math.log(V)
    assert found["context_2d"] == pytest.approx(border, abs=0.02)
    assert found["bigram_previous_pixel"] == pytest.approx(math.log(V), rel=0.02)


def test_a_constant_image_costs_almost_nothing() -> None:
    """The weight of the smoothing decreases with the counts."""
    picture = np.random.default_rng(5).integers(0, V, (1, T)).astype(np.uint16)
    found = count_models(picture.repeat(2000, 0), picture.repeat(10, 0), PX, V)
    assert found["unigram_by_position"] < 1e-3


def test_unseen_colours_have_a_positive_probability() -> None:
    """Otherwise one new colour in the test split would make the baseline infinite."""
    fit = np.zeros((50, T), np.uint16)
    test = np.full((5, T), V - 1, np.uint16)
    assert all(math.log(V) < nats < 20 for nats in count_models(fit, test, PX, V).values())
    vast = count_models(fit + np.uint16(65535), fit[:5], PX, 65536)
    assert all(math.isfinite(nats) for nats in vast.values())
