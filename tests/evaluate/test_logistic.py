"""Logistic regression: scikit-learn's minimum with L-BFGS, and nearly its accuracy with SGD."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from igpt_ray.data.digits import digits
from igpt_ray.data.palette import Palette
from igpt_ray.data.pixels import centre_view
from igpt_ray.evaluate.config import SgdConfig
from igpt_ray.evaluate.features import Features, Labels, pooled
from igpt_ray.evaluate.linear_probe import L2
from igpt_ray.evaluate.logistic import Linear, fit_lbfgs, fit_sgd, gradient, minimise, moments
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT


@pytest.fixture(scope="module")
def real() -> tuple[Features, Labels]:
    """Standardised features of 1,797 digits at the middle layer of an untrained network: (1797, 128), strongly
    correlated."""
    palette = Palette(np.random.default_rng(7).uniform(-1, 1, (64, 3)).astype(np.float32))
    pictures = list(digits(seed=0))
    tokens = np.stack([palette.encode(centre_view(p.png, 8, "fast-1").reshape(-1, 3)) for p in pictures])
    torch.manual_seed(0)
    model = ImageGPT(ModelConfig(n_layer=4, n_embd=128, n_head=4, n_px=8, n_vocab=64)).eval()
    found = pooled(model, tokens, [p.key for p in pictures], [2], "mean", 256)[:, 0]
    mean, deviation = moments(found, np.arange(len(found)))
    return (found - mean) / deviation, np.array([int(p.key.split("/")[1]) for p in pictures])


def loss(weight: NDArray[np.floating], bias: NDArray[np.floating], x: Features, y: Labels, l2: float) -> float:
    logits = x.astype(np.float64) @ weight.astype(np.float64).T + bias
    nats = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]
    return float(nats.mean() + l2 / 2 * (weight.astype(np.float64) ** 2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_the_minimum_on_real_features_equals_scikit_learn_s(
    device: torch.device, real: tuple[Features, Labels], l2: float
) -> None:
    """It does not stop early, the bias is not penalised, and the penalty does not grow with the number of images."""
    x, y = real
    weight, bias = minimise(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), 10, (l2,))[l2]
    with threadpool_limits(1):
        reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-9, max_iter=50_000).fit(x.astype(np.float64), y)
    theirs = loss(reference.coef_, reference.intercept_, x, y, l2)
    assert loss(weight, bias, x, y, l2) == pytest.approx(theirs, rel=1e-6)
    agreed = (Linear(np.zeros(128), np.ones(128), weight, bias).logits(x).argmax(1) == reference.predict(x)).mean()
    assert agreed >= 0.999


def test_a_path_of_penalties_equals_single_fits(real: tuple[Features, Labels]) -> None:
    """A warm start must not depend on the previous penalty."""
    x, y = torch.from_numpy(real[0]).double(), torch.from_numpy(real[1])  # as `fit_lbfgs` has so few rows
    path = minimise(x, y, 10, L2)
    assert set(path) == set(L2)
    for l2 in L2:
        alone = minimise(x, y, 10, (l2,))[l2]
        assert loss(*path[l2], *real, l2) == pytest.approx(loss(*alone, *real, l2), rel=1e-6)


@pytest.mark.parametrize("rows", [8, 60])
def test_fewer_rows_than_features_have_the_same_minimum(real: tuple[Features, Labels], rows: int) -> None:
    """The search is restricted to the span of the rows."""
    x, y = real[0][::30][:rows], real[1][::30][:rows]
    weight, bias = minimise(torch.from_numpy(x), torch.from_numpy(y), 10, (1e-2,))[1e-2]
    assert weight.shape == (10, 128)
    whole = LogisticRegression(C=1 / (1e-2 * rows), tol=1e-10, max_iter=50_000).fit(x.astype(np.float64), y)
    theirs = np.zeros((10, 128)), np.full(10, -30.0)  # scikit-learn leaves out classes that it never saw
    theirs[0][whole.classes_], theirs[1][whole.classes_] = whole.coef_, whole.intercept_
    assert loss(weight, bias, x, y, 1e-2) <= loss(*theirs, x, y, 1e-2) * (1 + 1e-4)


def test_the_gradient_equals_autograd_s(device: torch.device, real: tuple[Features, Labels]) -> None:
    """With chunks that do not divide the rows."""
    x, y = torch.from_numpy(real[0]).to(device).double().repeat(3, 1), torch.from_numpy(real[1]).to(device).repeat(3)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(10, 128, generator=generator).double(), torch.randn(10, generator=generator).double()
    weight, bias = weight.to(device), bias.to(device)
    weight.requires_grad_()
    bias.requires_grad_()
    expected = torch.nn.functional.cross_entropy(x @ weight.T + bias, y)
    expected.backward()
    nats, by_weight, by_bias = gradient(x, y, weight.detach(), bias.detach())
    torch.testing.assert_close(nats, expected.detach())
    torch.testing.assert_close(by_weight, weight.grad)
    torch.testing.assert_close(by_bias, bias.grad)


def test_rows_outside_the_fit_are_not_used(real: tuple[Features, Labels]) -> None:
    """A mean over all rows would include held-out images."""
    x, y = real
    rows = np.arange(0, 900)
    spoilt = x.copy()
    spoilt[900:] = np.nan
    for first, second in (
        (fit_lbfgs(x, y, rows, 10, (1e-3,))[1e-3], fit_lbfgs(spoilt, y, rows, 10, (1e-3,))[1e-3]),
        (fit_sgd(x, y, rows, 10, SgdConfig(steps=5), 0)[1], fit_sgd(spoilt, y, rows, 10, SgdConfig(steps=5), 0)[1]),
    ):
        assert np.array_equal(first.weight, second.weight)
        assert np.array_equal(first.mean, second.mean)


def test_sgd_comes_within_three_thousandths_of_l_bfgs(real: tuple[Features, Labels]) -> None:
    """Measured on images that neither was fitted to, with the best candidate of each."""
    x, y = real
    rows, others = np.arange(0, 1437), np.arange(1437, 1797)

    def best(fitted: dict[float, Linear]) -> float:
        return max(float((linear.logits(x[others]).argmax(1) == y[others]).mean()) for linear in fitted.values())

    by_lbfgs = best(fit_lbfgs(x, y, rows, 10, L2))
    by_sgd = best(fit_sgd(x, y, rows, 10, SgdConfig(steps=4000), seed=0))
    assert by_sgd >= by_lbfgs - 0.003


def test_sgd_is_a_function_of_its_seed_and_its_rates_are_independent(real: tuple[Features, Labels]) -> None:
    """Rates that are fitted together must not affect each other."""
    x, y = real
    rows = np.arange(len(x))
    both = fit_sgd(x, y, rows, 10, SgdConfig(steps=30, lrs=(1, 0.1)), seed=3)
    alone = fit_sgd(x, y, rows, 10, SgdConfig(steps=30, lrs=(0.1,)), seed=3)
    np.testing.assert_allclose(both[0.1].weight, alone[0.1].weight, atol=1e-6)
    other = fit_sgd(x, y, rows, 10, SgdConfig(steps=30, lrs=(0.1,)), seed=4)
    assert not np.allclose(other[0.1].weight, alone[0.1].weight, atol=1e-4)


def test_sgd_reads_features_from_a_file(real: tuple[Features, Labels], tmp_path: object) -> None:
    x, y = real
    mapped = np.memmap(f"{tmp_path}/x.f32", np.float32, "w+", shape=x.shape)
    mapped[:] = x
    rows = np.arange(len(x))
    first, second = (fit_sgd(features, y, rows, 10, SgdConfig(steps=20), 0) for features in (x, mapped))
    assert all(np.array_equal(first[lr].weight, second[lr].weight) for lr in first)


def test_a_rate_that_diverges_is_excluded(real: tuple[Features, Labels]) -> None:
    x, y = real
    found = fit_sgd(x, y, np.arange(len(x)), 10, SgdConfig(steps=20, lrs=(3e38, 0.1)), 0)
    assert list(found) == [0.1]
