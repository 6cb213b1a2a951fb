"""Decoding at the head widths and the 1,024 positions of the published models, on the CPU and on CUDA.

The reference is one full forward pass in float64 on the CPU.
"""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model, random_tokens
from torch import Tensor, nn

from igpt_ray.generate.engine import Engine, Generation, Request
from igpt_ray.generate.kv_cache import KVCache
from igpt_ray.generate.quantize import Int8, Precision
from igpt_ray.model.image_gpt import ImageGPT

PRECISIONS: list[Precision] = ["float32", "bfloat16", "int8"]
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2, "int8": 6e-2}
"""Largest norm of a position's error, relative to the norm of its logits. With one key too few it is 0.8."""
WIDTHS = {64: 4, 96: 2, 128: 2}
"""Heads by head width, those of iGPT-S, L and M."""
SLOTS, STEPS = 8, 8
ACTIVE = {0: 0, 2: 1, 3: 300, 5: 511, 7: 1016}
"""Position by slot; the other slots are idle."""


def wide_model(width: int, device: torch.device, modern: bool = False) -> ImageGPT:
    """Two layers whose logits depend on the attention: a query has high scores for about 20 of 1,000 keys."""
    heads = WIDTHS[width]
    shape: dict[str, Any] = {"n_layer": 2, "n_embd": heads * width, "n_head": heads, "n_px": 32, "n_vocab": 512}
    model = random_model(std=0.3, qk_norm=modern, rotary=modern, **shape)
    for block in model.blocks:
        block.mlp.c_proj.weight *= 0.2
        if modern:
            block.attn.q_norm.weight *= 5
            block.attn.k_norm.weight *= 5
    return model.to(device)


def reference(model: ImageGPT, precision: Precision) -> ImageGPT:
    """The same network on the CPU in float64 with the weights that `precision` stores."""
    exact = ImageGPT(model.config).double().requires_grad_(False)
    stored = torch.float32 if precision == "float32" else torch.bfloat16
    exact.load_state_dict({name: value.to(stored) for name, value in model.state_dict().items()})
    if precision == "int8":
        for name, module in exact.named_modules():
            if isinstance(module, nn.Linear):
                quantized = Int8(model.get_submodule(name).weight.cpu())
                module.weight.copy_(quantized.weight.double() * quantized.scale.double()[:, None])
    return exact


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest relative error of a position, by the norm over its logits."""
    difference = found.double().cpu() - expected
    return (difference.norm(dim=-1) / expected.norm(dim=-1)).max().item()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_steps_at_1024_positions_equal_a_full_pass(
    device: torch.device, width: int, modern: bool, precision: Precision
) -> None:
    """Slots are at other positions than their neighbours, idle slots are between them, and one reaches the end."""
    model = wide_model(width, device, modern)
    x = random_tokens(model, len(ACTIVE))
    cache = KVCache(model, SLOTS, precision)
    for row, (slot, start) in enumerate(ACTIVE.items()):
        if start:
            cache.prefill([slot], x[row, :start])
    starts, steps = list(ACTIVE.values()), []
    for step in range(STEPS):
        positions = [start + step for start in starts]
        previous = [int(x[row, max(t, 1) - 1]) for row, t in enumerate(positions)]
        steps.append(cache.decode_step(list(ACTIVE), positions, previous).clone())
    exact, x = reference(model, precision), x.cpu()
    expected = torch.cat([exact(x[row, None, : start + STEPS])[:, start:] for row, start in enumerate(starts)])
    assert largest_error(torch.stack(steps, dim=1), expected) < TOLERANCE[precision]


# ------------------------------------------------------------------------------------------------ samples

FREE = 16
"""Pixels that a request leaves free, at the end of the image."""


def requests_of(model: ImageGPT) -> list[Request]:
    """Requests with other first free pixels, some with prompt pixels between, and with all ways of sampling."""
    pictures, T = random_tokens(model, 5).cpu().numpy(), model.config.n_positions
    requests = []
    for i, picture in enumerate(pictures):
        mask = np.arange(T) < T - FREE + i
        if i % 2:
            mask[-3 * i : -i] = True
        how = [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0}][i]
        requests.append(Request(picture, mask, (10 * i, 10 * i + 1) if i == 1 else (10 * i,), **how))
    return requests


def drained(engine: Engine, requests: list[Request]) -> list[Generation]:
    generations = [engine.submit(request) for request in requests]
    while not all(generation.finished for generation in generations):
        engine.step()
    return generations


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_samples_are_the_same_alone_and_among_others(device: torch.device, width: int, precision: Precision) -> None:
    """Kernels must not sum a slot's keys in another order when other slots are active or at other positions."""
    model = wide_model(width, device, modern=width == 64)
    requests = requests_of(model)
    engine = Engine(model, SLOTS, precision)
    together = drained(engine, requests)
    for request, generation in zip(requests, together, strict=True):
        (alone,) = drained(engine, [request])
        np.testing.assert_array_equal(alone.tokens, generation.tokens)
    assert len({generation.tokens[0, -FREE:].tobytes() for generation in together}) == len(together)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_float32_samples_on_cuda_are_those_of_the_cpu() -> None:
    """A pixel may differ only where a random number is within rounding of a limit between two colours."""
    found = []
    for device in ("cpu", "cuda"):
        model = wide_model(64, torch.device(device))
        found.append(drained(Engine(model, SLOTS), requests_of(model)))
    for on_cpu, on_cuda in zip(*found, strict=True):
        np.testing.assert_array_equal(on_cuda.tokens, on_cpu.tokens)
