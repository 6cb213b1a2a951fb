"""Triton kernels against float64: on CUDA if there is a device, otherwise in Triton's interpreter."""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, random_tokens
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

from igpt_ray import rng  # noqa: E402
from igpt_ray.generate import sampler, triton_kernels, triton_sampler  # noqa: E402
from igpt_ray.generate.device_loop import DeviceLoop  # noqa: E402
from igpt_ray.generate.kv_cache import KVCache  # noqa: E402
from igpt_ray.generate.quantize import Int8, Precision  # noqa: E402
from igpt_ray.generate.triton_linear import linear_of_few_rows  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(
    slots: int, heads: int, width: int, positions: int, dtype: torch.dtype, packed: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cache, q, k and v. `packed`: q, k and v are views of one tensor, as the attention layer returns them."""
    g = torch.Generator().manual_seed(0)
    cache = torch.randn(2, slots, heads, positions, width, generator=g)
    qkv = torch.randn(slots, 1, 3, heads, width, generator=g).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.to(DEVICE, dtype) if packed else (x.contiguous() for x in qkv.to(DEVICE, dtype))
    return cache.to(DEVICE, dtype), q, k, v


def exact(cache: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: list[int]) -> Tensor:
    rows = []
    for slot, t in enumerate(positions):
        keys, values = (torch.cat([cache[i, slot, :, :t], new[slot]], dim=1).double() for i, new in ((0, k), (1, v)))
        weights = (q[slot].double() @ keys.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        rows.append(weights @ values)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "splits"), [(64, 1), (64, 4), (96, 2), (128, 16), (8, 8)])
def test_attention_of_one_query_reads_the_positions_of_its_slot(dtype: torch.dtype, width: int, splits: int) -> None:
    """Lengths of one position, of a whole block, one more than a block, and of the whole cache; parts may be empty.
    Positions that a slot has not reached hold NaN, and so does the query's own position, which the kernel writes."""
    own = [0, 1, 63, 64, 65, 199, 130]
    cache, q, k, v = inputs(len(own), 2, width, 200, dtype, packed=splits != 4)
    for slot, t in enumerate(own):
        cache[:, slot, :, t:] = torch.nan
    expected, before = exact(cache, q, k, v, own), cache.clone()
    found = triton_kernels.decode_attention(cache, q, k, v, torch.tensor(own, device=DEVICE), splits)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for slot, t in enumerate(own):
        before[:, slot, :, t] = torch.stack([k[slot, :, 0], v[slot, :, 0]])
    assert torch.equal(cache.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("splits", [1, 4])
def test_attention_of_a_slot_does_not_depend_on_other_slots(splits: int) -> None:
    cache, q, k, v = inputs(3, 2, 64, 100, torch.float32)
    found = []
    for own in ([70, 5, 99], [70, 80, 0]):
        mine = cache.clone()
        mine[:, 1:] *= own[1]
        found.append(triton_kernels.decode_attention(mine, q, k, v, torch.tensor(own, device=DEVICE), splits)[0])
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("options", [set(), {"gain"}, {"residual"}, {"gain", "gelu"}, {"gain", "gelu", "residual"}])
@pytest.mark.parametrize(
    ("weights", "rows"),
    [("float32", 1), ("float32", 5), *((weights, rows) for weights in ("bfloat16", "int8") for rows in (1, 2, 17, 32))],
)
def test_a_linear_layer_of_few_rows(weights: str, rows: int, options: set[str]) -> None:
    """Neither the inputs nor the outputs are a multiple of a block. Padding rows are not written."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    x, w = (torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in ((rows, 520), (37, 520)))
    gain, residual = (torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in ((520,), (rows, 37)))
    scale = None
    exact = w.double()
    if weights == "int8":
        layer = Int8(w)
        w, scale = layer.weight, layer.scale
        exact = w.double() * scale.double()[:, None]
    h = x.double()
    if "gain" in options:
        h = F.rms_norm(h, (520,), gain.double(), 1e-5)
    expected = h @ exact.T
    if "gelu" in options:
        expected = expected * (1.702 * expected).sigmoid()
    if "residual" in options:
        expected = expected + residual.double()
    found = linear_of_few_rows(
        x, w, scale, gain if "gain" in options else None, residual if "residual" in options else None, "gelu" in options
    )
    tolerance = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 520**0.5)


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True, "rotary": True}])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_step_of_fused_blocks_gives_the_same_logits(
    shape: dict[str, Any], precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers of a CUDA device, which are not packed for oneDNN."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = random_model(std=0.1, **shape).to(DEVICE)
    eager, fused = KVCache(model, 3, precision), KVCache(model, 3, precision)
    eager.splits, eager.fused, fused.splits, fused.fused = None, False, 2, True
    x = random_tokens(model, 3).to(DEVICE)
    for cache in (eager, fused):
        for slot, t in ((0, 5), (2, 15)):
            cache.prefill([slot], x[slot, :t])
    positions = torch.tensor([5, 0, 15], device=DEVICE)
    with torch.inference_mode():
        expected, found = (cache.forward_all(positions, x[:, 4]) for cache in (eager, fused))
    tolerance = 1e-5 if precision == "float32" else 3e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fused.kv, eager.kv, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("colours", [16, 100, 512])
def test_sampling_gives_the_colours_of_the_sampler(colours: int) -> None:
    """Two slots have a prompt pixel or are idle, one is at the last position, and uniforms are near 0 and 1."""
    g = torch.Generator().manual_seed(colours)
    n, T = 32, 6
    logits = 3 * torch.randn(n, colours, generator=g)
    uniforms = torch.rand(n, T, generator=g, dtype=torch.float64)
    uniforms[:3], uniforms[3:6] = 0, 1 - 2**-53
    temperature = torch.tensor([0, 0.5, 1, 3, 5e-324, 1e300], dtype=torch.float64).repeat(6)[:n]
    positions = torch.arange(n) % T
    prompt_mask = torch.zeros(n, T, dtype=torch.bool)
    prompt_mask[7] = True
    active = torch.ones(n, dtype=torch.long)
    active[8] = 0
    tokens = torch.randint(colours, (n, T), generator=g)
    expected, here = tokens.clone(), (torch.arange(n), positions)
    expected[here] = torch.where(
        prompt_mask[here], tokens[here], sampler.sample(logits, uniforms[here], temperature, None)
    )
    next_positions = (positions + active).clamp_max(T - 1)
    state = [x.to(DEVICE) for x in (logits, uniforms, temperature, prompt_mask, tokens, positions, active)]
    triton_sampler.sample(*state)
    assert torch.equal(state[4].cpu(), expected)
    assert torch.equal(state[5].cpu(), next_positions)


def test_a_device_loop_of_triton_kernels_gives_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot is idle, a pixel of the prompt is between generated ones, and the last position is reached."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = random_model(std=0.4, n_layer=1).to(DEVICE)
    found = []
    for kernels in (False, True):
        cache = KVCache(model, 3, "float32")
        cache.splits, cache.fused = (2, True) if kernels else (None, False)
        loop = DeviceLoop(cache, compiled=False)
        loop.sampler = triton_sampler if kernels else None
        loop.load(
            [0, 2],
            random_tokens(model, 1)[0],
            torch.arange(16) == 14,
            rng.uniforms([1, 2], 16),
            [0.5, 0.5],
            [0, 0],
            [1, 1],
        )
        found.append([loop.run([0, 2], start, 3, False)[[0, 2]] for start in ([0, 10], [3, 13])])
    for expected, tokens in zip(*found, strict=True):
        assert torch.equal(tokens, expected)


def test_sampling_that_differs_from_torch_s_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel that a compiler translates wrongly must not change samples without a message."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    loop = DeviceLoop(KVCache(random_model(n_layer=1).to(DEVICE), 3, "float32"), compiled=False)
    assert loop._sampler_of_triton() is triton_sampler
    monkeypatch.setattr(triton_sampler, "sample", lambda *state: None)  # leaves every token at 0
    assert loop._sampler_of_triton() is None
    assert "its samples differ" in caplog.text
