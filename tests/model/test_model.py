"""The network equals OpenAI's and transformers' implementations, and is causal."""

import cmath
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HF_SHAPES, random_hf, random_model, random_tokens, shifted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igpt_ray import weights
from igpt_ray.generate.kv_cache import KVCache
from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT, apply_rope, sdpa

Golden = tuple[ImageGPT, dict[str, Tensor]]


# ------------------------------------------------------------------------------------------------ OpenAI's own outputs


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    """OpenAI checkpoint of a tiny network, and the outputs of OpenAI's code."""
    folder = shared / "golden" / "openai_tiny"
    model = weights.load_openai(folder / "model.ckpt-1000")
    with np.load(folder / "golden.npz") as arrays:
        computed = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return model.requires_grad_(False), computed | {"tokens": computed["tokens"].long()}


def test_logits_and_loss_equal_openais(golden: Golden) -> None:
    """Covers norm, scale, activation, shift and the layout of matrices."""
    model, computed = golden
    logits = model(computed["tokens"])
    torch.testing.assert_close(logits, computed["gen_logits"], rtol=0, atol=2e-5)
    loss = losses.next_pixel(logits, computed["tokens"]).mean()
    torch.testing.assert_close(loss, computed["gen_loss"], rtol=0, atol=1e-6)


def test_keys_and_values_equal_openais(golden: Golden) -> None:
    """Swapped keys and values, or heads split along the wrong axis, would affect sampling only."""
    model, computed = golden
    slots = KVCache(model, 4, "float32")
    for slot, x in enumerate(computed["tokens"]):
        slots.prefill([slot], x)
    present = slots.kv.permute(2, 0, 1, 3, 4, 5)  # (B, L, 2, N, T, D)
    torch.testing.assert_close(present, computed["present"], rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("shape", HF_SHAPES)
def test_logits_and_features_equal_transformers(device: torch.device, shape: dict[str, int]) -> None:
    """A second reference, at other shapes. Features are the mean of ln_1's output, not the residual stream."""
    hf = random_hf(**shape)
    model = weights.load_hf(hf.state_dict(), n_head=hf.config.n_head).requires_grad_(False).to(device)
    on_device = random_tokens(model, 3)
    x = on_device.cpu()
    out = hf(shifted(x, model), output_hidden_states=True)
    torch.testing.assert_close(model(on_device).cpu(), out.logits, rtol=0, atol=2e-5)
    assert out.logits.abs().max() > 0.1  # not a comparison of zeros
    blocks = zip(hf.transformer.h, out.hidden_states[:-1], strict=True)
    expected = [block.ln_1(h).mean(1) for block, h in blocks] + [out.hidden_states[-1].mean(1)]
    torch.testing.assert_close(model.features(on_device).cpu(), torch.stack(expected, 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_features_may_stop_early(device: torch.device, last: int) -> None:
    """Layers are numbered as in a full pass."""
    model = random_model(device=device)
    x = random_tokens(model, 2)
    torch.testing.assert_close(model.features(x, last), model.features(x)[:, : last + 1])


# ------------------------------------------------------------------------------------------------ by itself


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_the_first_loss_is_the_logarithm_of_the_colours(
    device: torch.device, objective: Literal["next", "masked"]
) -> None:
    """The head is initialised with zeros and not tied to the input: published curves begin at ln 512."""
    model = ImageGPT(ModelConfig(n_layer=2, n_embd=32, n_head=4, n_px=16, objective=objective)).to(device)
    x = random_tokens(model, 2)
    keep = random_keep(model, 2) if objective == "masked" else None
    nats = losses.generative(model, x, keep).item() / (x.numel() if keep is None else len(x))
    assert nats == pytest.approx(math.log(512), abs=1e-6)


def test_weights_are_initialised_as_in_openais_code() -> None:
    """torch's defaults would train worse without an error."""
    torch.manual_seed(0)
    shape = ModelConfig(n_layer=4, n_embd=256, n_head=4, n_px=16)
    C, L = shape.n_embd, shape.n_layer
    expected = {"wte.weight": 0.02, "wpe": 0.01, "sos": 0.02}
    for i in range(L):
        expected |= {f"h.{i}.attn.c_attn.weight": C**-0.5, f"h.{i}.attn.c_proj.weight": (C * L) ** -0.5}
        expected |= {f"h.{i}.mlp.c_fc.weight": 0.02, f"h.{i}.mlp.c_proj.weight": 0.02}
    for name, value in ImageGPT(shape).state_dict().items():
        if "ln_" in name:
            assert (value == 1).all(), name
        elif name == "wtet.weight":
            assert (value == 0).all()
        else:
            error = 5 / (2 * value.numel()) ** 0.5  # five standard errors of a standard deviation
            assert value.std().item() == pytest.approx(expected.pop(name), rel=error), name
            assert abs(value.mean()) < 5 * value.std() / value.numel() ** 0.5, name
    assert not expected


def test_equal_seeds_give_equal_weights() -> None:
    """A run must be repeatable."""
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(ImageGPT(ModelConfig(n_layer=1, n_embd=16, n_head=2, n_px=4)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["sos"], states[2]["sos"])


@pytest.mark.parametrize("t", [0, 1, 7, 15])
def test_a_token_changes_only_later_positions(device: torch.device, t: int) -> None:
    """With a mask off by one, a pixel would attend to itself: a low loss, and useless samples."""
    model = random_model(device=device)
    x = random_tokens(model, 2)
    y = x.clone()
    y[:, t] = (y[:, t] + 1) % model.config.n_vocab
    before, after = model(x), model(y)
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])
    changed = (before != after).any(-1)[:, t + 1 :]
    assert changed.all()


def test_position_matters(device: torch.device) -> None:
    """Without positions, an image of one colour would have the same prediction everywhere."""
    model = random_model(device=device)
    logits = model(torch.zeros(1, 16, dtype=torch.long, device=device))
    assert len(torch.unique(logits[0], dim=0)) == 16


def test_every_weight_has_a_gradient(device: torch.device) -> None:
    """Including the last position and the start vector."""
    model = random_model(device=device).requires_grad_(True)
    x = random_tokens(model, 8)
    losses.next_pixel(model(x), x).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        used = parameter.grad if name != "wte.weight" else parameter.grad[x[:, :-1].unique()]
        assert (used != 0).any(-1).all(), name


# ------------------------------------------------------------------------------------------------ the default path


def test_gradients_of_queries_keys_and_values_are_copied_once() -> None:
    """Attention's three gradients are concatenated to that of c_attn's output, without another copy."""
    model = random_model().requires_grad_(True)
    h = model.blocks[0](torch.randn(2, 16, 32))
    with OperatorNames() as operators:
        h.backward(torch.ones_like(h))
    assert operators.names.count("aten::cat") == 1
    assert not {"aten::stack", "aten::clone", "aten::copy_"} & set(operators.names)


class OperatorNames(TorchDispatchMode):
    """Records the operators that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(operator.name().split(".")[0])
        return operator(*args, **kwargs or {})


def plain_nats(state: dict[str, Tensor], x: Tensor, n_head: int) -> Tensor:
    """Next-pixel nats with torch's functions alone, without any option of the network."""
    B, T = x.shape
    C = state["sos"].shape[0]

    def norm(h: Tensor, name: str) -> Tensor:
        return F.rms_norm(h, (C,), state[name], 1e-5)

    h = torch.cat([state["sos"].expand(B, 1, -1), F.embedding(x[:, :-1], state["wte.weight"])], 1) + state["wpe"][:T]
    for i in range(sum(name.endswith("ln_1.weight") for name in state)):
        qkv = F.linear(norm(h, f"h.{i}.ln_1.weight"), state[f"h.{i}.attn.c_attn.weight"])
        q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
        whole = partial(F.scaled_dot_product_attention, is_causal=True)
        y = (whole if q.dtype == torch.float32 else partial(sdpa, causal=True))(q, k, v)
        h = h + F.linear(y.transpose(1, 2).reshape(B, T, C), state[f"h.{i}.attn.c_proj.weight"])
        m = F.linear(norm(h, f"h.{i}.ln_2.weight"), state[f"h.{i}.mlp.c_fc.weight"])
        h = h + F.linear(m * torch.sigmoid(1.702 * m), state[f"h.{i}.mlp.c_proj.weight"])
    logits = F.linear(norm(h, "ln_f.weight"), state["wtet.weight"])
    return F.cross_entropy(logits.float().view(B * T, -1), x.view(B * T), reduction="none").sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_do_not_change_a_bit_of_the_default(dtype: torch.dtype) -> None:
    """A disabled option must not change an operation, or an older run could not be resumed."""
    model = random_model(std=0.15, n_embd=64, n_px=8).requires_grad_(True).to(dtype)
    x = random_tokens(model, 3)
    expected = plain_nats(dict(model.named_parameters()), x, 4)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    nats = losses.generative(model, x)
    nats.backward()
    assert torch.equal(nats, expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def test_options_do_not_change_the_weights_of_a_seed() -> None:
    """An additional random number would change every run of a seed."""
    torch.manual_seed(4)
    c = ModelConfig(n_layer=2, n_embd=16, n_head=2, n_px=4, n_vocab=8)
    own = ImageGPT(c).state_dict()
    torch.manual_seed(4)
    torch.nn.Embedding(8, 16)  # torch initialises its modules, in the order in which they are made
    for _ in range(2):
        for rows, columns in ((48, 16), (16, 16), (64, 16), (16, 64)):
            torch.nn.Linear(columns, rows, bias=False)
    torch.nn.Linear(16, 8, bias=False)
    drawn = [("wte.weight", 0.02), ("wpe", 0.01), ("sos", 0.02)]
    for i in range(2):
        drawn += [(f"h.{i}.attn.c_attn.weight", 16**-0.5), (f"h.{i}.attn.c_proj.weight", 32**-0.5)]
        drawn += [(f"h.{i}.mlp.c_fc.weight", 0.02), (f"h.{i}.mlp.c_proj.weight", 0.02)]
    for name, std in drawn:
        assert torch.equal(own[name], torch.empty_like(own[name]).normal_(std=std)), name


# ------------------------------------------------------------------------------------------------ modern

MODERN = {"qk_norm": True, "rotary": True}


def test_rotary_positions_rotate_each_pair_by_its_angle(device: torch.device) -> None:
    """By hand: elements i and i + D/2 as a complex number times e^(i angle); the first half of the pairs by rows."""
    model = random_model(rotary=True, device=device)
    x = torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(0)).to(device)
    rope = model.rotation(16)
    assert rope is not None
    found = apply_rope(x, rope)
    for t in range(16):
        row, column = divmod(t, 4)
        for i, angle in enumerate([row, row / 10, column, column / 10]):
            point = torch.complex(x[:, :, t, i], x[:, :, t, i + 4]) * cmath.exp(1j * angle)
            torch.testing.assert_close(found[:, :, t, i], point.real, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[:, :, t, i + 4], point.imag, rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_the_differences_of_rows_and_columns(device: torch.device) -> None:
    """Not on absolute positions, and not on raster order, where a row follows the end of the previous one."""
    model = random_model(rotary=True, n_px=8, device=device)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).to(device).expand(64, 2, 8).transpose(0, 1)
    rope = model.rotation(64)
    assert rope is not None
    agreement = (apply_rope(q, rope) @ apply_rope(k, rope).T).cpu()  # (64, 64)
    at = {}
    for i, j in itertools.product(range(64), repeat=2):
        between = (j // 8 - i // 8, j % 8 - i % 8)
        assert agreement[i, j].item() == pytest.approx(at.setdefault(between, agreement[i, j].item()), abs=1e-5)
    assert abs(at[0, 1] - at[1, -7]) > 1e-2  # pixel 8 follows pixel 7, and is no neighbour of it


def test_qk_norm_makes_attention_independent_of_the_projections_scale(device: torch.device) -> None:
    """The norms are per head, on queries and keys only, and before attention."""
    model = random_model(qk_norm=True, device=device)
    x = random_tokens(model, 2)
    before = model(x)
    for block in model.blocks:
        scales = 1 + torch.arange(8, device=device).repeat_interleave(8)[:, None] * 4.0
        block.attn.c_attn.weight[:64] *= scales  # q and k, by head
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    model.blocks[0].attn.c_attn.weight[64:] *= 2
    assert (model(x) - before).abs().max() > 0.1


@pytest.mark.parametrize("option", [{}, *({k: v} for k, v in MODERN.items()), MODERN], ids=str)
def test_a_modern_block_equals_its_formula(device: torch.device, option: dict[str, str | bool]) -> None:
    """The reference is written head by head with torch's functions."""
    model = random_model(**option, device=device)
    block = model.blocks[0]
    h = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)).to(device)
    q, k, v = (part.unflatten(2, (4, 8)) for part in block.attn.c_attn(block.ln_1(h)).chunk(3, dim=2))  # (B, T, N, D)
    if "qk_norm" in option:
        q, k = (
            y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
            for y, norm in ((q, block.attn.q_norm), (k, block.attn.k_norm))
        )
    rope = model.rotation(16)
    if rope is not None:
        q, k = (apply_rope(y.transpose(1, 2), rope).transpose(1, 2) for y in (q, k))
    weights = torch.einsum("bind,bjnd->bnij", q, k) / 8**0.5
    weights = weights.masked_fill(torch.ones(16, 16, device=device).bool().triu(1), -math.inf).softmax(-1)
    h1 = h + block.attn.c_proj(torch.einsum("bnij,bjnd->bind", weights, v).flatten(2))
    inner = block.mlp.c_fc(block.ln_2(h1))
    expected = h1 + block.mlp.c_proj(inner * torch.sigmoid(1.702 * inner))
    torch.testing.assert_close(block(h, rope), expected, rtol=1e-4, atol=1e-4)


def test_features_of_a_modern_network_end_with_its_hidden_states(device: torch.device) -> None:
    """Both forward and features apply rotary positions."""
    model = random_model(**MODERN, device=device)
    x = random_tokens(model, 3)
    torch.testing.assert_close(model.features(x)[:, -1], model.hidden(x).mean(1))


# ------------------------------------------------------------------------------------------------ masked, with a head


def random_keep(model: ImageGPT, n: int) -> Tensor:
    return losses.sample_masks(list(range(n)), model.config.n_positions).to(model.wpe.device)


def test_the_output_depends_on_visible_pixels_and_not_on_masked_ones(device: torch.device) -> None:
    """Otherwise the network would copy the pixels that it should predict."""
    model = random_model(objective="masked", device=device)
    assert not hasattr(model, "sos")
    x, keep = random_tokens(model, 2), torch.ones(2, 16, device=device).bool()
    keep[:, 5] = False
    for t, seen in ((5, False), (0, True), (15, True)):
        y = x.clone()
        y[:, t] = (y[:, t] + 1) % 16
        changed = (model(x, keep) != model(y, keep)).any(-1)
        assert (changed == seen).all()
    both = keep.clone()
    both[:, 6] = False
    assert (model(x, keep) != model(x, both)).any(-1).all()  # where a pixel is missing is seen


def test_a_mask_without_masked_pixels_has_no_effect(device: torch.device) -> None:
    model = random_model(objective="masked", device=device)
    x = random_tokens(model, 2)
    assert torch.equal(model(x, torch.ones(2, 16, device=device).bool()), model(x))
    torch.testing.assert_close(
        model.features(x, visible_mask=torch.ones(2, 16, device=device).bool()), model.features(x)
    )
    keep = random_keep(model, 2)
    assert not torch.equal(model.features(x, visible_mask=keep), model.features(x))
    torch.testing.assert_close(model.features(x, visible_mask=keep)[:, -1], model.hidden(x, keep).mean(1))


def test_the_head_reads_the_mean_after_the_last_norm_and_is_initialised_with_zeros(device: torch.device) -> None:
    """A random head would disturb the first steps of fine-tuning."""
    model = random_model(n_class=5, device=device)
    x = random_tokens(model, 3)
    logits, classes = model.forward_with_classifier(x)
    assert torch.equal(logits, model(x))
    torch.testing.assert_close(classes, model.features(x)[:, -1] @ model.wclf.weight.T)
    fresh = ImageGPT(model.config).to(device)
    assert (fresh.forward_with_classifier(x)[1] == 0).all()


@pytest.mark.parametrize("objective", ["next", "masked"])
@pytest.mark.parametrize("n_class", [0, 10])
def test_parameters_are_counted_with_every_option(objective: Literal["next", "masked"], n_class: int) -> None:
    """Masked networks have no `sos`; the head adds one row per class."""
    c = ModelConfig(n_layer=2, n_embd=32, n_head=4, n_px=4, n_vocab=16, objective=objective, n_class=n_class)
    assert sum(p.numel() for p in ImageGPT(c).parameters()) == c.n_params
    default = c.model_copy(update={"objective": "next", "n_class": 0}).n_params
    assert c.n_params == default - (32 if objective == "masked" else 0) + 32 * n_class
    modern = c.model_copy(update=MODERN)
    assert sum(p.numel() for p in ImageGPT(modern).parameters()) == modern.n_params == c.n_params + 2 * 2 * 8


@pytest.mark.parametrize("T", [2, 126, 128, 129], ids=lambda T: f"{T} positions")
def test_short_attention_in_bfloat16_rounds_only_inputs_and_outputs(device: torch.device, T: int) -> None:
    """At 128 x 64 and below a CPU attends in float32, above in bfloat16; neither is far from float64."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, T, 64).bfloat16().to(device)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    error = (sdpa(q, k, v, causal=True).double() - exact).abs()
    assert sdpa(q, k, v, causal=True).dtype == torch.bfloat16
    assert (error <= (2**-8 if T <= 128 and device.type == "cpu" else 2**-6) * exact.abs().clamp(min=1)).all()
