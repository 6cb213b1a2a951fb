"""Losses, logits, gradients and features of every precision against float64 on the CPU, on the CPU and on CUDA."""

from typing import Any, NamedTuple

import pytest
import torch
from conftest import random_model, random_tokens
from torch import Tensor

from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT

TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (3e-2, 0.1)}
"""Norm of an error relative to the norm of the exact tensor: of results, and of gradients."""
RESULTS = ("logits", "features", "loss")
MODERN = {"qk_norm": True, "rotary": True}


class Case(NamedTuple):
    model: ImageGPT
    x: Tensor
    visible_mask: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Case":
        """A copy whose weights were rounded to `dtype` before."""
        model = ImageGPT(self.model.config).to(device, dtype)
        model.load_state_dict(self.model.state_dict())
        mask = self.visible_mask
        return Case(model.eval(), self.x.to(device), None if mask is None else mask.to(device))

    def loss(self) -> Tensor:
        """Sum over the images of their mean nats."""
        per_image = self.x.shape[1] if self.visible_mask is None else 1
        return losses.generative(self.model, self.x, self.visible_mask) / per_image


def case_of(width: int, objective: str, modern: bool, dtype: torch.dtype) -> Case:
    """Three images of 144 positions, more than one tile of an attention kernel.

    Logits depend on the attention. Weights are rounded to `dtype`.
    """
    shape: dict[str, Any] = {"n_layer": 2, "n_embd": 2 * width, "n_head": 2, "n_px": 12, "n_vocab": 64}
    model = random_model(std=0.3, objective=objective, **shape, **(MODERN if modern else {}))
    for block in model.blocks:
        block.mlp.c_proj.weight *= 0.2
    model.wtet.weight *= 0.2
    if modern:
        for block in model.blocks:
            block.attn.q_norm.weight *= 5
            block.attn.k_norm.weight *= 5
    x = random_tokens(model, 3)
    mask = losses.sample_masks([1, 2, 3], 144) if objective == "masked" else None
    return Case(model.to(dtype), x, mask)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("objective", ["next", "masked"])
@pytest.mark.parametrize("width", [64, 96, 128])
def test_the_network_is_as_exact_as_its_precision(
    device: torch.device, width: int, objective: str, modern: bool, dtype: torch.dtype
) -> None:
    """Logits, features, the loss and the gradient of every weight."""
    rounded = case_of(width, objective, modern, dtype)
    exact, case = rounded.to(torch.device("cpu"), torch.float64), rounded.to(device, dtype)
    results = []
    for c in (exact, case):
        with torch.no_grad():
            logits, features = c.model(c.x, c.visible_mask), c.model.features(c.x, visible_mask=c.visible_mask)
        loss = c.loss()
        loss.backward()
        gradients = {name: p.grad for name, p in c.model.named_parameters() if p.grad is not None}
        results.append(dict(zip(RESULTS, (logits, features, loss.detach()), strict=True)) | gradients)
    expected, found = results
    assert found.keys() == expected.keys()
    assert len(found) == len(RESULTS) + len(list(rounded.model.parameters()))
    errors = {name: relative(found[name], value.double()) for name, value in expected.items()}
    limit, limit_of_gradients = TOLERANCE[dtype]
    assert max(errors[name] for name in RESULTS) < limit, errors
    assert max(errors.values()) < limit_of_gradients, errors
