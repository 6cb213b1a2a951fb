"""KV cache: its logits equal those without a cache, and do not depend on the other slots."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, random_tokens
from torch import Tensor, nn

from igpt_ray.errors import SettingError
from igpt_ray.generate import quantize
from igpt_ray.generate.kv_cache import KVCache
from igpt_ray.generate.quantize import Int8, Packed, Precision

PRECISIONS: list[Precision] = ["float32", "bfloat16", "int8"]
SHAPES: list[dict[str, Any]] = [
    {},
    {"qk_norm": True, "rotary": True},
    {"n_layer": 1, "n_embd": 512, "n_head": 8, "n_vocab": 100},
]


def followed(cache: KVCache, x: Tensor, start: int) -> Tensor:
    """Logits of the positions from `start` on, with x (n, T) in the slots: (n, T - start, V)."""
    n, T = x.shape
    if start:
        for slot in range(n):
            cache.prefill([slot], x[slot, :start])
    steps = [cache.decode_step(range(n), [t] * n, x[:, max(t, 1) - 1].tolist()) for t in range(start, T)]
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("given", [0, 1, 5, 15])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cache_gives_the_logits_of_a_full_pass(device: torch.device, given: int, shape: dict[str, Any]) -> None:
    """A position off by one, or keys stored before their rotation, would affect samples only."""
    model = random_model(std=0.1, **shape, device=device)
    x = random_tokens(model, 3)
    found = followed(KVCache(model, 3, "float32"), x, given)
    torch.testing.assert_close(found, model(x)[:, given:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_slot_is_bit_identical_whatever_the_other_slots_contain(precision: Precision, shape: dict[str, Any]) -> None:
    """A kernel chosen by the number of rows, or attention over the longest slot, would make a completion depend on
    other requests. The slot is compared alone in a smaller cache, among slots of its position, and among all others."""
    model = random_model(std=0.1, **shape)
    x = random_tokens(model, 7)
    own = [4, 9, 2, 9, 0, 15, 9]
    among = KVCache(model, 7, precision)
    alone = KVCache(model, 2, precision)
    for slot, t in enumerate(own):
        if t:
            among.prefill([slot], x[slot, :t])
    before = [int(x[slot, max(t, 1) - 1]) for slot, t in enumerate(own)]
    for together in ([0, 1, 2, 3, 4, 5, 6], [1, 3, 6], [5, 6], [2, 3, 4]):
        found = among.decode_step(together, [own[i] for i in together], [before[i] for i in together])
        for row, i in enumerate(together):
            if own[i]:
                alone.prefill([1], x[i, : own[i]])
            assert torch.equal(alone.decode_step([1], [own[i]], [before[i]])[0], found[row])


def test_a_prompt_gives_the_same_cache_alone_and_among_others(device: torch.device) -> None:
    """As on CUDA, where a pass has a fixed number of prompts: five prompts are two passes, and one is a pass too."""
    model = random_model(**SHAPES[1], device=device)
    x = random_tokens(model, 5)
    among, alone = KVCache(model, 6, "float32"), KVCache(model, 6, "float32")
    among.prompts_per_pass = alone.prompts_per_pass = 4
    among.prefill_all([[1], [0, 3], [2], [4], [5]], x[:, :7])
    for slots, prompt in zip([[1], [0, 3], [2], [4], [5]], x, strict=True):
        alone.prefill(slots, prompt[:7])
    assert among.kv[:, :, :, :, :7].abs().amin(dim=(0, 1, 3, 4, 5)).gt(0).all()  # every slot
    assert torch.equal(among.kv, alone.kv)
    one_by_one = KVCache(model, 6, "float32")
    one_by_one.prompts_per_pass = 1
    one_by_one.prefill([0, 3], x[1, :7])
    torch.testing.assert_close(one_by_one.kv[:, :, [0, 3]], among.kv[:, :, [0, 3]], rtol=1e-4, atol=1e-5)


def test_samples_of_an_image_share_its_prefill(device: torch.device) -> None:
    """After the prefill, every sample has its own keys and values."""
    model = random_model(device=device)
    x = random_tokens(model, 3)
    x[1:, :5] = x[0, :5]
    cache = KVCache(model, 4, "float32")
    cache.prefill([0, 2, 3], x[0, :5])
    for t in range(5, 16):
        found = cache.decode_step([0, 2, 3], [t] * 3, x[:, t - 1].tolist())
    torch.testing.assert_close(found, model(x)[:, 15], rtol=1e-4, atol=1e-4)


def test_the_smallest_number_of_rows_with_stable_products_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of this test computes fewer than five rows in another order."""

    class Fickle(nn.Module):
        def __init__(self, weight: Tensor):
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) if len(x) >= 5 else F.linear(x * 3, self.weight / 3)

    monkeypatch.setattr(quantize, "Packed", Fickle)
    assert KVCache(random_model(), 2, "float32").min_rows >= 5


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("shape", [(40, 32), (16, 64), (512, 512)])
def test_packed_layers_compute_their_products(shape: tuple[int, int], rows: int) -> None:
    """40 rows use another code path than 6."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(shape, generator=g), torch.randn(rows, 2, shape[1], generator=g)
    expected = F.linear(x, w)
    torch.testing.assert_close(Packed(w)(x), expected, rtol=1e-5, atol=1e-4)
    assert (Int8(w)(x.bfloat16()) - expected).norm() < 0.015 * expected.norm()


def test_the_model_keeps_its_own_weights(device: torch.device) -> None:
    """A network may be scored or saved after it was packed for a cache."""
    model = random_model(device=device)
    x = random_tokens(model, 2)
    logits = model(x)
    for precision in PRECISIONS:
        followed(KVCache(model, 2, precision), x, 3)
    assert torch.equal(model(x), logits)


def test_a_masked_network_is_an_error() -> None:
    """It has no start vector."""
    with pytest.raises(SettingError, match="which cannot generate"):
        KVCache(random_model(objective="masked"), 1, "float32")


def test_a_step_of_all_slots_gives_the_logits_of_a_full_pass(device: torch.device) -> None:
    """The function of a CUDA graph. No slot attends beyond its position, and idle slots do not affect others."""
    model = random_model(**SHAPES[1], device=device)
    x = random_tokens(model, 3)
    cache = KVCache(model, 4, "float32")
    cache.prefill([1], x[0, :6])
    cache.prefill([3], x[1, :15])
    found = cache.forward_all(
        torch.tensor([0, 6, 0, 15], device=device),
        torch.tensor([0, int(x[0, 5]), 0, int(x[1, 14])], device=device),
    )[[0, 1, 3]]
    expected = torch.stack([model(x)[2, 0], model(x)[0, 6], model(x)[1, 15]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_without_triton_the_slower_attention_is_taken_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "igpt_ray.generate.triton_kernels", None)
    assert KVCache(random_model(), 2, "float32")._splits_of_the_kernel() is None
    assert "Triton's attention kernel cannot be used" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: decoding on CUDA is not tested")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cache_on_cuda_gives_the_logits_of_one_on_the_cpu(precision: Precision) -> None:
    model = random_model()
    x = random_tokens(model, 3)
    expected = followed(KVCache(model, 3, precision), x, 4)
    found = followed(KVCache(model.cuda(), 3, precision), x, 4).cpu()
    tolerance = 1e-4 if precision == "float32" else 0.1
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)
