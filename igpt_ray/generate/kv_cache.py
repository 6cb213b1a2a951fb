"""KV cache with several slots, each at its own position.

A slot's logits have the same bits whatever the other slots hold. Attention is computed per slot. All slots share the
matrix products, and a library may choose another kernel, with another order of summation, for another number of
rows. The constructor finds by trial the number of rows from which on the results do not change, and every step computes
at least that many rows.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_ray.errors import SettingError
from igpt_ray.generate.cuda_graph import Attend, CUDAGraph
from igpt_ray.generate.quantize import PACKED_ROWS, Precision, prepare_network
from igpt_ray.model.image_gpt import ImageGPT, sdpa


class Run(NamedTuple):
    """Consecutive slots at one position: their attention is one call."""

    rows: slice
    slots: slice
    length: int


class KVCache:
    """KV cache with `n` slots. The caller tracks which slots are active and each slot's position."""

    def __init__(self, model: ImageGPT, n: int, precision: Precision):
        """Raises `SettingError` for a masked network."""
        if not model.causal:
            raise SettingError(
                "the model was trained with --model.objective masked, which cannot generate: use a model trained with "
                "--model.objective next"
            )
        c, self.device = model.config, model.wpe.device
        self.network = prepare_network(model, precision)
        shape = (c.n_layer, 2, n, c.n_head, c.n_positions, c.head_width)
        self.kv = torch.zeros(shape, dtype=self.network.wpe.dtype, device=self.device)
        """Keys and values (L, 2, slots, N, T, D), allocated once."""
        self.rope = model.rotation(c.n_positions)
        self.graph = CUDAGraph(n, c.n_positions, self.device, self.forward) if self.device.type == "cuda" else None
        self.min_rows = n if self.graph else self._same_bits_from(max(n, PACKED_ROWS))
        """Least number of rows that a step computes."""

    @torch.inference_mode()
    def prefill(self, slots: Sequence[int], prompt: Tensor) -> None:
        """Process the first tokens, prompt (S,), in one pass and copy the result to all `slots`."""
        S, first, m = len(prompt), slots[0], self.network
        h, rope = m.embed(prompt[None].to(self.device)), m.rotation(S)
        for block, kv in zip(m.blocks, self.kv, strict=True):
            h = block(h, rope, partial(_attend_from_the_start, kv[:, first, :, :S]))
        for slot in slots[1:]:
            self.kv[:, :, slot, :, :S] = self.kv[:, :, first, :, :S]

    @torch.inference_mode()
    def decode_step(self, slots: Sequence[int], positions: Sequence[int], previous_tokens: Sequence[int]) -> Tensor:
        """Logits (slots, V) of the active slots, in ascending order, at their `positions`.

        `previous_tokens` are the tokens at the positions before (ignored at position 0). Every earlier position of a
        slot must have been processed by `prefill` or `decode_step`.
        """
        if self.graph is not None:
            return self.graph.decode_step(slots, positions, previous_tokens)
        n, padding = len(slots), [0] * (self.min_rows - len(slots))
        at, tokens = torch.tensor([*positions, *padding]), torch.tensor([*previous_tokens, *padding])
        attend = partial(_attend_runs, torch.tensor(slots), at[:n], _runs(slots, positions))
        return self.forward(at, tokens, attend)[:n]

    def forward(self, positions: Tensor, previous_tokens: Tensor, attend: Attend) -> Tensor:
        """(rows,), (rows,) -> (rows, V). `attend` takes a layer's cache, q, k and v."""
        m = self.network
        h = torch.where(positions[:, None] > 0, m.wte(previous_tokens), m.sos) + m.wpe[positions]  # (rows, C)
        h = h[:, None]  # (rows, 1, C)
        rope = None if self.rope is None else self.rope[:, positions, None, None]  # (2, rows, 1, 1, D / 2)
        for block, kv in zip(m.blocks, self.kv, strict=True):
            h = block(h, rope, partial(attend, kv))
        return m.wtet(m.ln_f(h))[:, 0]

    @torch.inference_mode()
    def _same_bits_from(self, most: int) -> int:
        """The least number of rows, up to `most`, from which on a row has the same bits at every place in the batch."""
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
    """Causal attention of (1, N, S, D) that stores its keys and values in `kv` (2, N, S, D)."""
    kv[:] = torch.cat([k, v])
    return sdpa(q, k, v, causal=True)


def _attend_runs(
    slots: Tensor, positions: Tensor, runs: list[Run], kv: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attention of one query per slot, (rows, N, 1, D), to the slot's own positions. Padding rows stay zero."""
    n = len(slots)
    kv[:, slots, :, positions] = torch.stack([k[:n, :, 0], v[:n, :, 0]], dim=1)  # (slots, 2, N, D)
    y = torch.zeros_like(q)
    for rows, here, length in runs:
        keys, values = kv[:, here, :, :length]  # each (slots, N, length, D)
        y[rows] = F.scaled_dot_product_attention(q[rows], keys, values)
    return y


def _runs(slots: Sequence[int], positions: Sequence[int]) -> list[Run]:
    """Group the rows into runs of consecutive slots at one position."""
    runs = []
    steps = itertools.groupby(range(len(slots)), key=lambda row: (slots[row] - row, positions[row]))
    for (offset, position), group in steps:
        rows = list(group)
        first, end = rows[0], rows[-1] + 1
        runs.append(Run(slice(first, end), slice(first + offset, end + offset), position + 1))
    return runs
