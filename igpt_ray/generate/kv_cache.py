"""Slots: a network with the keys and values of several samples, each at a position of its own. Sampling's arithmetic.

A slot's logits are the same bits whatever the other slots hold. Attention is over a slot's own positions. For products,
which all slots share, a library may choose another kernel for another number of rows, and with it another order of
summation: from how many rows on it does not is found by trial when the slots are made, and so many are always computed.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_ray.errors import SettingError
from igpt_ray.model.image_gpt import ImageGPT, sdpa

Precision = Literal["float32", "bfloat16", "int8"]
"""Of weights, keys and values. With int8, weights are integers with a scale for each output, all else is bfloat16."""
ROWS = 32
"""For which packed weights are laid out: one number for all, as another layout is another order of summation. Of more
rows torch's product with int8 takes several times as long as bfloat16's."""


class Run(NamedTuple):
    """Neighbouring slots at one position, which attend in one call."""

    rows: slice
    slots: slice
    length: int


class KVCache:
    """`n` samples of a network. Who calls knows which slots are in use, and where they stand."""

    def __init__(self, model: ImageGPT, n: int, precision: Precision):
        """Raises `SettingError` for a masked network."""
        if not model.causal:
            raise SettingError("a masked network has no next pixel: completions need one with the objective next")
        c, self.device = model.config, model.wpe.device
        self.network = _prepared(model, precision)
        shape = (c.n_layer, 2, n, c.n_head, c.n_positions, c.head_width)
        self.kv = torch.zeros(shape, dtype=self.network.wpe.dtype, device=self.device)
        """Keys and values, (L, 2, slots, N, T, D), allocated once."""
        self.turns = model.rotation(c.n_positions)
        self.graph = Graph(self) if self.device.type == "cuda" else None
        self.fewest = n if self.graph else self._same_bits_from(max(n, ROWS))
        """Rows that are computed even for fewer slots."""

    @torch.inference_mode()
    def fill(self, slots: Sequence[int], given: Tensor) -> None:
        """The first positions of samples of one picture, in one pass: (S,) colours."""
        S, first, m = len(given), slots[0], self.network
        h, rope = m.embed(given[None].to(self.device)), m.rotation(S)
        for block, kv in zip(m.blocks, self.kv, strict=True):
            h = block(h, rope, partial(_attend_from_the_start, kv[:, first, :, :S]))
        for slot in slots[1:]:
            self.kv[:, :, slot, :, :S] = self.kv[:, :, first, :, :S]

    @torch.inference_mode()
    def logits(self, slots: Sequence[int], at: Sequence[int], before: Sequence[int]) -> Tensor:
        """What slots in use, in rising order, predict at their positions `at`, whose predecessors have the colours
        `before` (anything at position 0): (slots, V). All earlier positions must have been filled or asked for."""
        if self.graph is not None:
            return self.graph.logits(slots, at, before)
        n, spare = len(slots), [0] * (self.fewest - len(slots))
        where, colours = torch.tensor([*at, *spare]), torch.tensor([*before, *spare])
        attend = partial(_attend_runs, torch.tensor(slots), where[:n], _runs(slots, at))
        return self.forward(where, colours, attend)[:n]

    def forward(self, at: Tensor, before: Tensor, attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """(rows,), (rows,) -> (rows, V); `attend` is given a layer's cache, q, k and v."""
        m = self.network
        h = torch.where(at[:, None] > 0, m.wte(before), m.sos) + m.wpe[at]  # (rows, C)
        h = h[:, None]  # (rows, 1, C)
        rope = None if self.turns is None else self.turns[:, at, None, None]  # (2, rows, 1, 1, D / 2)
        for block, kv in zip(m.blocks, self.kv, strict=True):
            h = block(h, rope, partial(attend, kv))
        return m.wtet(m.ln_f(h))[:, 0]

    @torch.inference_mode()
    def _same_bits_from(self, most: int) -> int:
        """The number of rows from which on, up to `most`, a row comes out the same, wherever it stands."""
        m, block = self.network, self.network.blocks[0]
        C = m.config.n_embd
        h = torch.randn(most, 1, C, generator=torch.Generator().manual_seed(0)).to(m.wpe)

        def products(h: Tensor) -> Tensor:
            y = block.attn.c_proj(block.attn.c_attn(block.ln_1(h))[..., :C])
            return torch.cat([y, block.mlp(block.ln_2(h)), m.wtet(m.ln_f(h))], dim=-1)

        whole = products(h)
        for rows in range(most - 1, 0, -1):
            if not torch.equal(products(h[:rows]), whole[:rows]) or not torch.equal(products(h[-rows:]), whole[-rows:]):
                return rows + 1
        return 1


def _attend_from_the_start(kv: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, each (1, N, S, D), that leaves its keys and values in (2, N, S, D)."""
    kv[:] = torch.cat([k, v])
    return sdpa(q, k, v, causal=True)


def _attend_runs(slots: Tensor, at: Tensor, runs: list[Run], kv: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query a slot over the slot's own positions, each (rows, N, 1, D). Rows beyond the slots are left zero."""
    n = len(slots)
    kv[:, slots, :, at] = torch.stack([k[:n, :, 0], v[:n, :, 0]], dim=1)  # (slots, 2, N, D)
    y = torch.zeros_like(q)
    for rows, here, length in runs:
        keys, values = kv[:, here, :, :length]  # each (slots, N, length, D)
        y[rows] = F.scaled_dot_product_attention(q[rows], keys, values)
    return y


def _runs(slots: Sequence[int], at: Sequence[int]) -> list[Run]:
    """Rows whose slots follow each other and stand at one position."""
    runs = []
    steps = itertools.groupby(range(len(slots)), key=lambda row: (slots[row] - row, at[row]))
    for (offset, position), group in steps:
        rows = list(group)
        first, end = rows[0], rows[-1] + 1
        runs.append(Run(slice(first, end), slice(first + offset, end + offset), position + 1))
    return runs


# ------------------------------------------------------------------------------------------------ weights


def _prepared(model: ImageGPT, precision: Precision) -> ImageGPT:
    """The same network with products that are fast for few rows. What is not converted is shared with `model`."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    with torch.device("meta"):
        network = ImageGPT(model.config).eval().requires_grad_(False)
    given = model.state_dict()
    network.load_state_dict({name: value.to(dtype) for name, value in given.items()}, assign=True)
    packed = model.wpe.device.type == "cpu" and _onednn_has(dtype)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and (packed or precision == "int8"):
            network.set_submodule(name, Int8(given[f"{name}.weight"]) if precision == "int8" else Packed(module.weight))
    return network


def _onednn_has(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Packed(nn.Module):
    """A linear layer whose weight lies as oneDNN wants it, instead of being laid out so in every call: at iGPT-S's
    sizes a third faster, for one row as for 32. These are the operators that torch.compile puts in its place."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class Int8(nn.Module):
    """A linear layer with weights in 8 bits and a scale for each output, for inputs in bfloat16."""

    def __init__(self, weight: Tensor):
        super().__init__()
        scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127  # (out,)
        self.scale = scale.to(torch.bfloat16)
        self.weight = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > ROWS:  # as bfloat16, in which integers up to 127 are exact
            y = F.linear(rows, self.weight.to(torch.bfloat16)) * self.scale
        else:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        return y.view(*x.shape[:-1], -1)


# ------------------------------------------------------------------------------------------------ CUDA


class Graph:
    """The step of all slots, used or not, recorded once and replayed: hundreds of small kernels, one launch.

    Shapes cannot change in a graph, so attention looks at all positions and masks those that a slot has not reached.
    """

    def __init__(self, slots: KVCache):
        n = slots.kv.shape[2]
        self.slots = slots
        self.at = torch.zeros(n, dtype=torch.long, device=slots.device)
        self.before = torch.zeros_like(self.at)
        self.all = torch.arange(n, device=slots.device)
        self.recorded: torch.cuda.CUDAGraph | None = None

    def logits(self, slots: Sequence[int], at: Sequence[int], before: Sequence[int]) -> Tensor:
        where = self.place(slots, at, before)
        if self.recorded is None:
            self._record()
        assert self.recorded is not None
        self.recorded.replay()
        return self.out[where]

    def place(self, slots: Sequence[int], at: Sequence[int], before: Sequence[int]) -> Tensor:
        """Put down where the slots in use stand; returns which they are."""
        where, positions, colours = torch.tensor([list(slots), list(at), list(before)], device=self.at.device)
        self.at.zero_()
        self.at[where] = positions
        self.before[where] = colours
        return where

    def _record(self) -> None:
        """Run it beside the stream first, as torch asks: libraries allocate on their first call."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.recorded):
            self.out = self.run()

    def run(self) -> Tensor:
        """(slots, V). A slot that is not in use writes over its first position, which is filled before it is."""
        reached = torch.arange(self.slots.kv.shape[4], device=self.at.device) <= self.at[:, None]  # (slots, T)
        return self.slots.forward(self.at, self.before, partial(self._attend, reached[:, None, None]))

    def _attend(self, reached: Tensor, kv: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv[:, self.all, :, self.at] = torch.stack([k[:, :, 0], v[:, :, 0]], dim=1)
        return F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=reached)
