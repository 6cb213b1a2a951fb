"""The network: equal to OpenAI's own and to transformers', causal, and the same with a cache as without."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model, random_tokens
from numpy.typing import NDArray
from torch import Tensor
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from igpt_ray import config, objectives
from igpt_ray.model import ImageGPT, KVCache

Variables = dict[str, NDArray[np.float32]]


# ------------------------------------------------------------------------------------------------ OpenAI's checkpoint


def read_checkpoint(folder: Path) -> Variables:
    """The variables of a TensorFlow V2 checkpoint, without TensorFlow.

    The `.index` file is a LevelDB table: blocks of (name, BundleEntryProto), found through an index block whose place
    stands in the last 48 bytes. An entry says in which data file, where and how long a tensor's raw floats are.
    """
    (index_file,) = folder.glob("*.index")
    shapes = json.loads((folder / "config.json").read_text())["variables"]
    index = index_file.read_bytes()
    assert index[-8:] == bytes.fromhex("57fb808b247547db"), "not a LevelDB table"
    _, at = varint(index, len(index) - 48)
    _, at = varint(index, at)  # the first two numbers place the unused metaindex
    variables = {}
    for _, handle in block(index, *varint_pair(index, at)):
        for name, entry in block(index, *varint_pair(handle, 0)):
            if name:  # the empty name holds the header
                fields = proto(entry)
                shard, offset, size = (fields.get(number, 0) for number in (3, 4, 5))
                (data_file,) = folder.glob(f"{index_file.stem}.data-{shard:05d}-of-*")
                raw = data_file.read_bytes()[offset : offset + size]
                variables[name] = np.frombuffer(raw, "<f4").reshape(shapes[name])
    assert variables.keys() == shapes.keys()
    return variables


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 number, lowest bits first, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def varint_pair(data: bytes, at: int) -> tuple[int, int]:
    first, at = varint(data, at)
    return first, varint(data, at)[0]


def block(data: bytes, offset: int, size: int) -> list[tuple[str, bytes]]:
    """The entries of a block: each key shares a prefix with the one before; restart points follow at the end."""
    assert data[offset + size] == 0, "a compressed block"
    restarts = int.from_bytes(data[offset + size - 4 : offset + size], "little")
    at, end, key, entries = offset, offset + size - 4 * restarts - 4, b"", []
    while at < end:
        same, at = varint(data, at)
        new, at = varint(data, at)
        length, at = varint(data, at)
        key = key[:same] + data[at : at + new]
        entries.append((key.decode(), data[at + new : at + new + length]))
        at += new + length
    return entries


def proto(data: bytes) -> dict[int, int]:
    """The integer fields of a protocol buffer message; others are passed over."""
    at, fields = 0, {}
    while at < len(data):
        tag, at = varint(data, at)
        if tag & 7 == 0:
            fields[tag >> 3], at = varint(data, at)
        elif tag & 7 == 2:
            length, at = varint(data, at)
            at += length
        else:
            assert tag & 7 == 5, f"wire type {tag & 7}"
            at += 4
    return fields


def from_openai(variables: Variables) -> dict[str, Tensor]:
    """facts.md, section 2: projections are [heads, head_dim, width], MLP matrices [in, out]."""
    v = {name.removeprefix("model/"): torch.from_numpy(value.copy()) for name, value in variables.items()}
    d = v["wpe"].shape[1]
    weights = {"wte.weight": v["wte"], "wpe": v["wpe"], "sos": v["sos"], "wtet.weight": v["wtet"]}
    weights["ln_f.weight"] = v["ln_f/g"]
    for i in range(sum(name.endswith("ln_1/g") for name in v)):
        attn = [v[f"h{i}/attn/{which}_proj"].reshape(d, d) for which in "qkv"]
        weights |= {
            f"h.{i}.ln_1.weight": v[f"h{i}/ln_1/g"],
            f"h.{i}.attn.c_attn.weight": torch.cat(attn),
            f"h.{i}.attn.c_proj.weight": v[f"h{i}/attn/c_proj"].reshape(d, d).T,
            f"h.{i}.ln_2.weight": v[f"h{i}/ln_2/g"],
            f"h.{i}.mlp.c_fc.weight": v[f"h{i}/mlp/c_fc/w"].T,
            f"h.{i}.mlp.c_proj.weight": v[f"h{i}/mlp/c_proj/w"].T,
        }
    return weights


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[ImageGPT, dict[str, Tensor]]:
    """A tiny network with OpenAI's checkpoint, and what OpenAI's code computed with it."""
    folder = shared / "golden" / "openai_tiny"
    about = json.loads((folder / "config.json").read_text())
    model = ImageGPT(config.Model(**{name: about[name] for name in config.Model.model_fields}))
    model.load_state_dict(from_openai(read_checkpoint(folder)))
    with np.load(folder / "golden.npz") as arrays:
        computed = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return model.eval().requires_grad_(False), computed | {"tokens": computed["tokens"].long()}


def test_logits_and_loss_are_openais(golden: tuple[ImageGPT, dict[str, Tensor]]) -> None:
    """Any slip of the network: the norm, the scale, the activation, the shift, a transposed matrix."""
    model, computed = golden
    logits = model(computed["tokens"])
    torch.testing.assert_close(logits, computed["gen_logits"], rtol=0, atol=2e-5)
    loss = objectives.next_pixel(logits, computed["tokens"]).mean()
    torch.testing.assert_close(loss, computed["gen_loss"], rtol=0, atol=1e-6)


def test_keys_and_values_are_openais(golden: tuple[ImageGPT, dict[str, Tensor]]) -> None:
    """Keys where values belong, or heads cut along the wrong axis: sampling would go wrong where training does not."""
    model, computed = golden
    cache = KVCache(model, 4)
    model.prefill(computed["tokens"][:, :-1], cache)
    present = cache.kv.permute(2, 0, 1, 3, 4, 5)  # (B, L, 2, N, T, D)
    torch.testing.assert_close(present, computed["present"], rtol=0, atol=2e-5)
    assert cache.length == 64


# ------------------------------------------------------------------------------------------------ transformers


def as_transformers(model: ImageGPT) -> ImageGPTForCausalImageModeling:
    """facts.md, section 8: `sos` is row V of the embedding, Conv1D is [in, out] with biases, dropout is on."""
    c, own = model.config, model.state_dict()
    shape = {"n_layer": c.n_layer, "n_embd": c.n_embd, "n_head": c.n_head, "n_positions": c.n_positions}
    hf = ImageGPTForCausalImageModeling(ImageGPTConfig(vocab_size=c.n_vocab + 1, **shape)).eval().requires_grad_(False)
    theirs = {"transformer.wte.weight": torch.cat([own.pop("wte.weight"), own.pop("sos")[None]])}
    theirs |= {"transformer.wpe.weight": own.pop("wpe"), "lm_head.weight": own.pop("wtet.weight")}
    for name, value in own.items():
        theirs[f"transformer.{name}"] = value.T if value.ndim == 2 else value
    for name, parameter in hf.named_parameters():
        parameter.copy_(torch.zeros_like(parameter) if name.endswith(".bias") else theirs.pop(name))
    assert not theirs
    return hf


@pytest.mark.parametrize("shape", [{}, {"n_layer": 2, "n_embd": 48, "n_head": 3, "n_px": 6, "n_vocab": 512}])
def test_logits_and_features_are_those_of_transformers(shape: dict[str, int]) -> None:
    """The second witness, at other shapes. Features: the mean of ln_1's output, not the raw residual stream."""
    model = random_model(std=0.15, **shape)
    hf = as_transformers(model)
    x = random_tokens(model, 3)
    shifted = torch.cat([torch.full((3, 1), model.config.n_vocab), x[:, :-1]], dim=1)
    out = hf(shifted, output_hidden_states=True)
    torch.testing.assert_close(model(x), out.logits, rtol=0, atol=2e-5)
    assert out.logits.abs().max() > 0.1  # not a comparison of zeros
    blocks = zip(hf.transformer.h, out.hidden_states[:-1], strict=True)
    expected = [block.ln_1(h).mean(1) for block, h in blocks] + [out.hidden_states[-1].mean(1)]
    torch.testing.assert_close(model.features(x), torch.stack(expected, 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_features_may_stop_early(last: int) -> None:
    """A layer off by one: the best layer of a probe would be another one in the release."""
    model = random_model()
    x = random_tokens(model, 2)
    torch.testing.assert_close(model.features(x, last), model.features(x)[:, : last + 1])


# ------------------------------------------------------------------------------------------------ by itself


def test_the_first_loss_is_the_logarithm_of_the_colours() -> None:
    """A head that is not zero, or tied to the input: every published curve begins at ln 512."""
    model = ImageGPT(config.Model(n_layer=2, n_embd=32, n_head=4, n_px=4))
    x = random_tokens(model, 2)
    nats = objectives.next_pixel(model(x), x)
    torch.testing.assert_close(nats, torch.full_like(nats, math.log(512)), rtol=1e-6, atol=0)


def test_weights_start_as_openais_did() -> None:
    """torch's defaults: the loss still falls, only worse."""
    torch.manual_seed(0)
    shape = config.Model(n_layer=4, n_embd=256, n_head=4, n_px=16)
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
    """A run that cannot be repeated."""
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(ImageGPT(config.Model(n_layer=1, n_embd=16, n_head=2, n_px=4)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["sos"], states[2]["sos"])


@pytest.mark.parametrize("t", [0, 1, 7, 15])
def test_a_token_changes_only_what_comes_after_it(t: int) -> None:
    """A mask off by one lets a pixel see itself: a wonderful loss, and samples of nothing."""
    model = random_model()
    x = random_tokens(model, 2)
    y = x.clone()
    y[:, t] = (y[:, t] + 1) % model.config.n_vocab
    before, after = model(x), model(y)
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])
    changed = (before != after).any(-1)[:, t + 1 :]
    assert changed.all()


def test_position_matters() -> None:
    """Positions added to the wrong axis, or not at all: a picture of one colour would be predicted alike everywhere."""
    model = random_model()
    logits = model(torch.zeros(1, 16, dtype=torch.long))
    assert len(torch.unique(logits[0], dim=0)) == 16


@pytest.mark.parametrize("given", [0, 1, 5, 15])
def test_a_cache_gives_the_logits_of_the_full_pass(given: int) -> None:
    """A position or a cache slot off by one shows only in samples."""
    model = random_model()
    x = random_tokens(model, 3)
    full = model(x)
    cache = KVCache(model, 3)
    logits = [model.prefill(x[:, :given], cache)]
    logits += [model.step(x[:, t], cache) for t in range(given, 15)]
    torch.testing.assert_close(torch.stack(logits, 1), full[:, given:], rtol=1e-5, atol=1e-5)
    assert cache.length == 16


def test_a_repeated_cache_is_a_copy_with_neighbouring_lanes() -> None:
    """Samples of one picture that write into each other's keys, or lanes in the order 0 1 2 0 1 2."""
    model = random_model()
    x = random_tokens(model, 2)
    cache = KVCache(model, 2)
    model.prefill(x[:, :4], cache)
    twice = cache.repeat(2)
    lanes = model.step(torch.tensor([1, 2, 3, 4]), twice)
    alone = [model.step(torch.tensor(pair), cache.repeat(1)) for pair in ([1, 3], [2, 4])]
    torch.testing.assert_close(lanes[0::2], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lanes[1::2], alone[1], rtol=1e-5, atol=1e-5)
    assert (cache.length, twice.length) == (5, 6)


def test_every_weight_learns() -> None:
    """A parameter that the forward pass forgot, such as the last position or the start vector."""
    model = random_model().requires_grad_(True)
    x = random_tokens(model, 8)
    objectives.next_pixel(model(x), x).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        used = parameter.grad if name != "wte.weight" else parameter.grad[x[:, :-1].unique()]
        assert (used != 0).any(-1).all(), name
