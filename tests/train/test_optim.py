"""Optimisers and schedules: Adam and Muon equal their references; a schedule is a function of the step."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import random_model, random_tokens
from numpy.typing import NDArray
from torch.nn import Parameter
from torch.optim import Adam, Muon

from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train import optim
from igpt_ray.train.config import OptimConfig
from igpt_ray.train.presets import PRESETS

SCHEDULE = OptimConfig(lr=2e-3, steps=110, warmup_steps=10)


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
    """The first step is not zero, and the cosine covers the steps after the warm-up."""
    assert optim.lr_at(step, SCHEDULE) == pytest.approx(share * 2e-3, abs=1e-12)


@pytest.mark.parametrize("schedule", [SCHEDULE, OptimConfig(warmup_steps=0, steps=7), PRESETS["tiny"][1].optim])
def test_the_learning_rate_rises_once_and_falls_once(schedule: OptimConfig) -> None:
    """There is no jump between warm-up and cosine, and no rate of zero before the end."""
    rates = np.array([optim.lr_at(step, schedule) for step in range(schedule.steps)])
    assert rates.max() == pytest.approx(schedule.lr)
    assert (rates > 0).all()
    assert (np.diff(rates[: schedule.warmup_steps]) > 0).all()
    assert (np.diff(rates[schedule.warmup_steps :]) < 0).all()


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    """No division by zero, and no negative part of the cosine."""
    rates = [optim.lr_at(step, OptimConfig(steps=10, warmup_steps=100)) for step in range(10)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.1 * 3e-3)


def adam(
    weight: NDArray[np.float64], gradients: list[NDArray[np.float64]], lrs: list[float], o: OptimConfig
) -> NDArray[np.float64]:
    """Kingma and Ba, algorithm 1, in float64."""
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    (b1, b2), w = o.betas, weight.copy()
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w -= lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + o.eps)
    return w


def test_steps_are_adams(device: torch.device) -> None:
    """No weight decay; betas and epsilon are exact; the rate is set before its step."""
    model = random_model(std=0.1, device=device).requires_grad_(True)
    settings = OptimConfig(lr=1e-2, betas=(0.8, 0.9), eps=1e-3)
    optimizer, lrs = optim.build(model, settings), [1e-2, 3e-3, 5e-3]
    before = {name: p.detach().double().cpu().numpy().copy() for name, p in model.named_parameters()}
    gradients: dict[str, list[NDArray[np.float64]]] = {name: [] for name in before}
    for i, lr in enumerate(lrs):
        x = random_tokens(model, 4, seed=i)
        optimizer.zero_grad()
        losses.next_pixel(model(x), x).mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            gradients[name].append(p.grad.double().cpu().numpy().copy())
        optim.set_lr(optimizer, lr)
        optimizer.step()
    for name, p in model.named_parameters():
        expected = adam(before[name], gradients[name], lrs, settings)
        np.testing.assert_allclose(p.detach().cpu().numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.abs(expected - before[name]).max() > 1e-3


def test_the_default_is_the_paper_s_adam() -> None:
    """torch's betas of (0.9, 0.999) would differ after the first step."""
    model = random_model()
    (group,) = optim.build(model, OptimConfig()).param_groups
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.9, 0.95), 0, 3e-3)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("settings", [OptimConfig(), OptimConfig(muon_lr=0.03)])
def test_a_checkpoint_of_another_device_keeps_the_optimiser_of_this_device(settings: OptimConfig) -> None:
    """Adam is fused on a GPU, where its step counts are on the device. The choice is stored in a checkpoint."""
    models = [random_model(std=0.1).requires_grad_(True) for _ in range(2)]
    ours, other = (optim.build(model, settings) for model in models)
    for model, optimizer in zip(models, (ours, other), strict=True):
        backward(model, 0)
        optimizer.step()
    state = deepcopy(other.state_dict())
    for group in state["param_groups"]:
        group["fused"] = True
    ours.load_state_dict(state)
    assert {group["fused"] for group in ours.param_groups} == {None}
    for model, optimizer in zip(models, (ours, other), strict=True):
        backward(model, 1)
        optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: fused Adam is not compared")
@pytest.mark.parametrize("settings", [OptimConfig(lr=1e-2), OptimConfig(lr=1e-2, muon_lr=0.03)])
def test_fused_adam_on_a_gpu_gives_the_weights_of_the_cpu(settings: OptimConfig) -> None:
    """Also after the state of a CPU run is loaded."""
    cpu = random_model(std=0.1).requires_grad_(True)
    gpu = random_model(std=0.1).requires_grad_(True).cuda()
    ours, theirs = optim.build(gpu, settings), optim.build(cpu, settings)
    assert {group["fused"] for group in ours.param_groups} == {True}
    for seed in range(4):
        backward(cpu, seed)
        for a, b in zip(gpu.parameters(), cpu.parameters(), strict=True):
            assert b.grad is not None
            a.grad = b.grad.cuda()
        theirs.step()
        ours.step()
        if seed == 1:
            ours.load_state_dict(deepcopy(theirs.state_dict()))
            assert {group["fused"] for group in ours.param_groups} == {True}
    for a, b in zip(gpu.parameters(), cpu.parameters(), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the modern recipe

MUON = OptimConfig(lr=1e-2, muon_lr=0.03)


def matrices_inside(model: ImageGPT) -> dict[str, Parameter]:
    return {name: p for name, p in model.named_parameters() if name.startswith("h.") and p.ndim == 2}


def backward(model: ImageGPT, seed: int) -> None:
    x = random_tokens(model, 4, seed=seed)
    model.zero_grad()
    losses.next_pixel(model(x), x).mean().backward()


class Torchs:
    """torch's Muon on every matrix of the blocks, with q, k and v separate, and its Adam on the rest."""

    def __init__(self, model: ImageGPT):
        inside = matrices_inside(model)
        self.fused = [block.attn.c_attn.weight for block in model.blocks]
        self.parts = [Parameter(q.detach().clone()) for p in self.fused for q in p.chunk(3)]
        matrices = [*self.parts, *(p for name, p in inside.items() if "c_attn" not in name)]
        rest = [p for name, p in model.named_parameters() if name not in inside]
        self.muon = Muon(matrices, lr=0.03, weight_decay=0)
        self.adam = Adam(rest, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)

    def step(self) -> None:
        gradients = [g for p in self.fused if p.grad is not None for g in p.grad.chunk(3)]
        for part, gradient in zip(self.parts, gradients, strict=True):
            part.grad = gradient
        self.muon.step()
        self.adam.step()
        for i, p in enumerate(self.fused):
            p.data = torch.cat([part.detach() for part in self.parts[3 * i : 3 * i + 3]])


def test_steps_equal_torch_s_muon_and_adam() -> None:
    """Bit-identical in torch's bfloat16. Covers momentum, Nesterov, the scale of tall matrices, the parameters of each
    optimiser, and the separation of q, k and v."""
    ours, theirs = (random_model(std=0.1).requires_grad_(True) for _ in range(2))
    optimizer, other = optim.build(ours, MUON, "bfloat16"), Torchs(theirs)
    for seed in range(3):
        backward(ours, seed)
        backward(theirs, seed)
        optimizer.step()
        other.step()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_an_update_preserves_singular_vectors_and_its_singular_values_are_near_one(device: torch.device) -> None:
    """U V' of the SVD is the exact result; five iterations give U S V' with S near 1."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 16), (16, 64), (24, 24)):
        u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        matrix = u * torch.linspace(0.3, 3, len(v)) @ v
        (found,) = (update.cpu() for update in optim.orthogonal([matrix.to(device)], 1))
        inner = u.T @ (found.float() / max(1, shape[0] / shape[1]) ** 0.5) @ v.T
        values = inner.diagonal()
        assert 0.6 < values.min() < values.max() < 1.3
        assert (inner - values.diag()).abs().max() < 0.03


def test_muon_updates_the_matrices_of_blocks_only_and_the_rates_keep_their_ratio() -> None:
    model = random_model(qk_norm=True)
    optimizer = optim.build(model, MUON)
    *hidden, rest = optimizer.param_groups
    assert {id(p) for g in hidden for p in g["params"]} == {id(p) for p in matrices_inside(model).values()}
    others = {id(p) for p in model.parameters()} - {id(p) for p in matrices_inside(model).values()}
    assert {id(p) for p in rest["params"]} == others
    optim.set_lr(optimizer, 5e-3)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.015] * 4 + [5e-3])


@pytest.mark.parametrize(
    ("step", "share"), [(0, 0.1), (9, 1), (10, 1), (59, 1), (60, 1), (80, 0.6), (109, 0.02), (110, 0)]
)
def test_a_cool_down_is_constant_and_then_linear(step: int, share: float) -> None:
    """Its share is of all steps, and the last step is not zero."""
    schedule = OptimConfig(lr=2e-3, steps=110, warmup_steps=10, schedule="warmup_stable_decay", decay_fraction=50 / 110)
    assert optim.lr_at(step, schedule) == pytest.approx(share * 2e-3, abs=1e-12)


def test_a_warm_up_that_overlaps_the_cool_down_does_not_exceed_it() -> None:
    schedule = OptimConfig(lr=1.0, steps=100, warmup_steps=40, schedule="warmup_stable_decay", decay_fraction=0.8)
    rates = np.array([optim.lr_at(step, schedule) for step in range(101)])
    assert rates.max() <= 1
    assert (np.diff(rates[40:]) <= 0).all()
    assert rates[100] == 0
