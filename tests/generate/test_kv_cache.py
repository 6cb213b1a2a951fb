"""Slots: the logits of the network without a cache, and the same bits whatever is in the slots beside."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, random_tokens
from torch import Tensor, nn

from igpt_ray.errors import SettingError
from igpt_ray.generate import quantize
from igpt_ray.generate.cuda_graph import CUDAGraph
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
def test_a_cache_gives_the_logits_of_the_full_pass(given: int, shape: dict[str, Any]) -> None:
    """A position or a cache slot off by one, keys that are stored before they are turned: it shows only in samples."""
    model = random_model(std=0.1, **shape)
    x = random_tokens(model, 3)
    found = followed(KVCache(model, 3, "float32"), x, given)
    torch.testing.assert_close(found, model(x)[:, given:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_lane_is_the_same_bits_beside_any_others(precision: Precision, shape: dict[str, Any]) -> None:
    """A kernel chosen by the number of rows, attention that sees the longest slot: a served completion would depend on
    who else is being served. Alone in another slot of fewer, among slots of its own position, and among all others."""
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


def test_samples_of_a_picture_share_its_prefill() -> None:
    """Slots that read each other's keys from then on, or one that was left out."""
    model = random_model()
    x = random_tokens(model, 3)
    x[1:, :5] = x[0, :5]
    cache = KVCache(model, 4, "float32")
    cache.prefill([0, 2, 3], x[0, :5])
    for t in range(5, 16):
        found = cache.decode_step([0, 2, 3], [t] * 3, x[:, t - 1].tolist())
    torch.testing.assert_close(found, model(x)[:, 15], rtol=1e-5, atol=1e-5)


def test_the_number_of_rows_is_found_from_which_products_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that sees nothing would trust any library. This one computes fewer than five rows in another way."""

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
def test_layers_compute_their_products(shape: tuple[int, int], rows: int) -> None:
    """Scales along the wrong axis, a weight that is laid out for other sizes; 40 rows take another way than 6."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(shape, generator=g), torch.randn(rows, 2, shape[1], generator=g)
    expected = F.linear(x, w)
    torch.testing.assert_close(Packed(w)(x), expected, rtol=1e-5, atol=1e-4)
    assert (Int8(w)(x.bfloat16()) - expected).norm() < 0.015 * expected.norm()


def test_the_model_keeps_its_own_weights() -> None:
    """A network that was given to slots and scored or saved afterwards would be another one."""
    model = random_model()
    x = random_tokens(model, 2)
    logits = model(x)
    for precision in PRECISIONS:
        followed(KVCache(model, 2, precision), x, 3)
    assert torch.equal(model(x), logits)


def test_a_masked_network_is_refused() -> None:
    """It has no start vector: an AttributeError from inside."""
    with pytest.raises(SettingError, match="which cannot generate"):
        KVCache(random_model(objective="masked"), 1, "float32")


def test_all_lanes_at_once_behind_a_mask_are_what_a_graph_replays() -> None:
    """What is recorded on CUDA, run here without recording: a slot that sees beyond its position, an idle one that
    disturbs another."""
    model = random_model(**SHAPES[1])
    x = random_tokens(model, 3)
    cache = KVCache(model, 4, "float32")
    graph = CUDAGraph(cache)
    cache.prefill([1], x[0, :6])
    cache.prefill([3], x[1, :15])
    graph.set_inputs([0, 1, 3], [0, 6, 15], [0, int(x[0, 5]), int(x[1, 14])])
    found = graph.run()[[0, 1, 3]]
    expected = torch.stack([model(x)[2, 0], model(x)[0, 6], model(x)[1, 15]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the recorded step is not tested")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_paints_what_the_cpu_does(precision: Precision) -> None:
    """A buffer that the recording does not read, or that a later replay writes over."""
    model = random_model()
    x = random_tokens(model, 3)
    expected = followed(KVCache(model, 3, precision), x, 4)
    found = followed(KVCache(model.cuda(), 3, precision), x, 4).cpu()
    tolerance = 1e-4 if precision == "float32" else 0.1
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)
