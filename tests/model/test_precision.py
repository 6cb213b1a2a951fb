"""A network on a CPU and on a GPU equals the same network in float64."""

import copy
from typing import Any

import pytest
import torch
from conftest import random_tokens
from torch import Tensor

from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03}
"""Largest norm of the error relative to the norm of the exact values. TF32 is off, torch's default."""
OPTIONS: list[dict[str, Any]] = [{}, {"qk_norm": True, "rotary": True}, {"objective": "masked"}]


def nats_and_gradients(model: ImageGPT, tokens: Tensor, visible_mask: Tensor | None) -> dict[str, Tensor]:
    nats = losses.generative(model, tokens, visible_mask)
    nats.backward()
    return {"nats": nats.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(config: ModelConfig, dtype: torch.dtype, device: str, compiled: bool = False) -> None:
    """Nats and every gradient of a network with OpenAI's initialisation and a random head."""
    torch.manual_seed(0)
    model = ImageGPT(config)
    torch.nn.init.normal_(model.wtet.weight, std=0.1)
    model = model.to(dtype)
    exact_model = copy.deepcopy(model).double()
    tokens = random_tokens(model, 2)
    visible_mask = losses.sample_masks([0, 1], config.n_positions) if config.objective == "masked" else None
    exact = nats_and_gradients(exact_model, tokens, visible_mask)
    model.to(device)
    for block in model.blocks if compiled else []:
        block.forward = torch.compile(block.forward, fullgraph=True)  # type: ignore[method-assign]
    values = nats_and_gradients(model, tokens.to(device), None if visible_mask is None else visible_mask.to(device))
    assert values.keys() == exact.keys() == {"nats"} | {name for name, _ in model.named_parameters()}
    for name, value in values.items():
        error = (value.double().cpu() - exact[name]).norm() / exact[name].norm()
        assert error <= TOLERANCES[dtype], (name, error.item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_network_equals_float64(options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Loss and gradients."""
    check(ModelConfig(n_layer=2, n_embd=128, n_head=2, n_px=8, n_vocab=64, **options), dtype, device)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("width", [64, 96, 128])
def test_a_gpu_equals_float64_at_full_size(width: int, compiled: bool) -> None:
    """The head widths of iGPT-S, L and M with 1,024 positions: a kernel of attention is chosen by shape."""
    torch._dynamo.reset()
    check(ModelConfig(n_layer=2, n_embd=2 * width, n_head=2, n_px=32), torch.bfloat16, "cuda", compiled)
