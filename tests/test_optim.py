"""The optimiser: Adam to the number, and a schedule that is a function of the step alone."""

import numpy as np
import pytest
from conftest import random_model, random_tokens
from numpy.typing import NDArray

from igpt_ray import objectives, optim
from igpt_ray.config import PRESETS, Optim

SCHEDULE = Optim(lr=2e-3, steps=110, warmup_steps=10)


COS_45 = 0.5**0.5


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (0, 0.1),
        (4, 0.5),
        (9, 1),
        (10, 1),
        (35, (1 + COS_45) / 2),
        (60, 0.5),
        (85, (1 - COS_45) / 2),
        (110, 0),
        (500, 0),
    ],
)
def test_the_learning_rate_at_known_points(step: int, share: float) -> None:
    """A first step of zero is wasted; a cosine over all steps instead of those after the warm-up ends too high."""
    assert optim.lr_at(step, SCHEDULE) == pytest.approx(share * 2e-3, abs=1e-12)


@pytest.mark.parametrize("schedule", [SCHEDULE, Optim(warmup_steps=0, steps=7), PRESETS["tiny"][1].optim])
def test_the_learning_rate_rises_once_and_falls_once(schedule: Optim) -> None:
    """A jump where warm-up meets cosine, or a rate of zero before the last step."""
    rates = np.array([optim.lr_at(step, schedule) for step in range(schedule.steps)])
    assert rates.max() == pytest.approx(schedule.lr)
    assert (rates > 0).all()
    assert (np.diff(rates[: schedule.warmup_steps]) > 0).all()
    assert (np.diff(rates[schedule.warmup_steps :]) < 0).all()


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    """A division by zero, or a negative share of the cosine."""
    rates = [optim.lr_at(step, Optim(steps=10, warmup_steps=100)) for step in range(10)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.1 * 3e-3)


def adam(
    weight: NDArray[np.float64], gradients: list[NDArray[np.float64]], lrs: list[float], o: Optim
) -> NDArray[np.float64]:
    """Kingma and Ba, algorithm 1, in float64."""
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    (b1, b2), w = o.betas, weight.copy()
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w -= lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + o.eps)
    return w


def test_steps_are_adams() -> None:
    """Weight decay, other betas, or an epsilon of another size; and a rate that is set after the step it is for."""
    model = random_model(std=0.1).requires_grad_(True)
    settings = Optim(lr=1e-2, betas=(0.8, 0.9), eps=1e-3)
    optimizer, lrs = optim.build(model, settings), [1e-2, 3e-3, 5e-3]
    before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    gradients: dict[str, list[NDArray[np.float64]]] = {name: [] for name in before}
    for i, lr in enumerate(lrs):
        x = random_tokens(model, 4, seed=i)
        optimizer.zero_grad()
        objectives.next_pixel(model(x), x).mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            gradients[name].append(p.grad.double().numpy().copy())
        optim.set_lr(optimizer, lr)
        optimizer.step()
    for name, p in model.named_parameters():
        expected = adam(before[name], gradients[name], lrs, settings)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.abs(expected - before[name]).max() > 1e-3


def test_the_default_is_the_papers_adam() -> None:
    """(0.9, 0.999), torch's own, would differ after the first step."""
    model = random_model()
    (group,) = optim.build(model, Optim()).param_groups
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.9, 0.95), 0, 3e-3)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
