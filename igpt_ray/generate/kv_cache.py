"""KV cache with several slots, each at its own position.

A slot's logits have the same bits whatever the other slots hold. Attention is computed per slot. All slots share the
matrix products, and a library may choose another kernel, with another order of summation, for another number of
rows. The constructor finds by trial the number of rows from which on the results do not change, and every step computes
at least that many rows.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from igpt_ray.errors import SettingError
from igpt_ray.generate.decode_block import compiled_block, decode_block, few_rows_linear
from igpt_ray.generate.quantize import PACKED_ROWS, Precision, prepare_network
from igpt_ray.model.image_gpt import Block, ImageGPT, sdpa

RunBlock = Callable[[Block, Tensor, Tensor | None, Tensor], Tensor]
"""A block, its input, the rotary embedding and the layer's cache -> the block's output."""

PROMPTS_PER_PASS = 8
"""Prompts that a pass of the prefill computes on CUDA, where the kernels' launches take longer than a prompt."""

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """Consecutive slots at one position: their attention is one call."""

    rows: slice
    slots: slice
    length: int


class KVCache:
    """KV cache with `n` slots. The caller tracks which slots are active and each slot's position."""

    def __init__(self, model: ImageGPT, n: int, precision: Precision, fused: bool = True):
        """`fused`: take the linear layers of `triton_linear` where they can be used, on CUDA.

        Raises `SettingError` for a masked network.
        """
        if not model.causal:
            raise SettingError(
                "the model was trained with --model.objective masked, which cannot generate: use a model trained with "
                "--model.objective next"
            )
        c, self.device, self.slots = model.config, model.wpe.device, n
        self.network = prepare_network(model, precision)
        shape = (c.n_layer, 2, n, c.n_head, c.n_positions, c.head_width)
        self.kv = torch.zeros(shape, dtype=self.network.wpe.dtype, device=self.device)
        """Keys and values (L, 2, slots, N, T, D), allocated once."""
        self.rope = model.rotation(c.n_positions)
        self.splits = self._splits_of_the_kernel() if self.device.type == "cuda" else None
        """Parts of an attention that `triton_kernels.decode_attention` computes; None without this kernel."""
        self.fused = fused and self.splits is not None and self._linear_kernel_works()
        """Whether a step takes the linear layers of `triton_linear`."""
        self.min_rows = n if self.device.type == "cuda" else self._same_bits_from(max(n, PACKED_ROWS))
        """Least number of rows that a step computes."""
        self.prompts_per_pass = PROMPTS_PER_PASS if self.device.type == "cuda" else 1

    def prefill(self, slots: Sequence[int], prompt: Tensor) -> None:
        """Process the first tokens, prompt (S,), in one pass and copy the result to all `slots`."""
        self.prefill_all([slots], prompt[None])

    @torch.inference_mode()
    def prefill_all(self, slots: Sequence[Sequence[int]], prompts: Tensor) -> None:
        """Process prompts of equal length, (n, S), and copy the result of each to its `slots`.

        A pass always has `prompts_per_pass` prompts, so that the bits of a result do not depend on the other prompts.
        """
        m, S, n = self.network, prompts.shape[1], self.prompts_per_pass
        rope = m.rotation(S)
        for start in range(0, len(prompts), n):
            some = prompts[start : start + n].to(self.device)
            first = torch.tensor([of_prompt[0] for of_prompt in slots[start : start + n]], device=self.device)
            h = m.embed(torch.cat([some, some[:1].expand(n - len(some), S)]))
            with without_cudnn():
                for block, kv in zip(m.blocks, self.kv, strict=True):
                    h = block(h, rope, partial(_attend_from_the_start, kv, first))
            for of_prompt in slots[start : start + n]:
                for slot in of_prompt[1:]:
                    self.kv[:, :, slot, :, :S] = self.kv[:, :, of_prompt[0], :, :S]

    @torch.inference_mode()
    def decode_step(self, slots: Sequence[int], positions: Sequence[int], previous_tokens: Sequence[int]) -> Tensor:
        """Logits (slots, V) of the active slots, in ascending order, at their `positions`.

        `previous_tokens` are the tokens at the positions before (ignored at position 0). Every earlier position of a
        slot must have been processed by `prefill` or `decode_step`.
        """
        if self.device.type == "cuda":
            return self._decode_on_device(slots, positions, previous_tokens)
        n, padding = len(slots), [0] * (self.min_rows - len(slots))
        at, tokens = torch.tensor([*positions, *padding]), torch.tensor([*previous_tokens, *padding])
        attend = partial(_attend_runs, torch.tensor(slots), at[:n], _runs(slots, positions))

        def run(block: Block, h: Tensor, rope: Tensor | None, kv: Tensor) -> Tensor:
            return block(h, rope, partial(attend, kv))

        return self._logits(self._run_blocks(self._embed(at, tokens), at, run))[:n]

    def _decode_on_device(
        self, slots: Sequence[int], positions: Sequence[int], previous_tokens: Sequence[int]
    ) -> Tensor:
        """Logits of the active slots, operation by operation; `DeviceLoop` records the same step as a graph."""
        state = torch.zeros(2, self.slots, dtype=torch.long)
        state[:, list(slots)] = torch.tensor([list(positions), list(previous_tokens)])
        at, previous = state.to(self.device)
        with without_cudnn():
            return self.forward_all(at, previous)[list(slots)]

    def forward_all(self, positions: Tensor, previous_tokens: Tensor, compiled: bool = False) -> Tensor:
        """Logits (slots, V) of every slot, active or not, as a function of tensors alone; see `decode_all`."""
        return self.decode_all(self._embed(positions, previous_tokens), positions, compiled)

    def decode_all(self, h: Tensor, positions: Tensor, compiled: bool = False) -> Tensor:
        """Logits (slots, V) of every slot from its input embedding h (slots, C).

        A slot writes its keys and values at its position: an inactive slot at 0, which is written again before its use.
        `compiled`: by torch.compile, which compiles one block for all layers.
        """
        bias = None
        if self.splits is None:
            T = self.kv.shape[4]
            unreached = torch.arange(T, device=self.device) > positions[:, None]  # (slots, T)
            bias = torch.zeros(self.slots, T, dtype=self.kv.dtype, device=self.device)
            bias = bias.masked_fill(unreached, -torch.inf)[:, None, None]
        run_block = compiled_block() if compiled else decode_block

        def run(block: Block, h: Tensor, rope: Tensor | None, kv: Tensor) -> Tensor:
            return run_block(block, h, rope, kv, positions, bias, self.splits, self.fused)

        h = self._run_blocks(h, positions, run)
        if self.fused:
            return few_rows_linear(self.network.wtet, h[:, 0], gain=self.network.ln_f.weight)
        return self._logits(h)

    def _embed(self, positions: Tensor, previous_tokens: Tensor) -> Tensor:
        m = self.network
        return torch.where(positions[:, None] > 0, m.wte(previous_tokens), m.sos) + m.wpe[positions]  # (rows, C)

    def _run_blocks(self, h: Tensor, positions: Tensor, run_block: RunBlock) -> Tensor:
        """(rows, C), (rows,) -> (rows, 1, C)."""
        m = self.network
        h = h[:, None]  # (rows, 1, C)
        rope = None if self.rope is None else self.rope[:, positions, None, None]  # (2, rows, 1, 1, D / 2)
        for block, kv in zip(m.blocks, self.kv, strict=True):
            h = run_block(block, h, rope, kv)
        return h

    def _logits(self, h: Tensor) -> Tensor:
        return self.network.wtet(self.network.ln_f(h))[:, 0]  # (rows, V)

    def _splits_of_the_kernel(self) -> int | None:
        """Import Triton's attention and try it on the first layer; None, with a warning, if it fails."""
        try:
            from igpt_ray.generate.triton_kernels import decode_attention, splits_for

            _, _, n, heads, _, width = self.kv.shape
            splits = splits_for(n, heads, self.device)
            new = torch.zeros(n, heads, 1, width, dtype=self.kv.dtype, device=self.device)
            decode_attention(self.kv[0], new, new, new, torch.zeros(n, dtype=torch.long, device=self.device), splits)
            return splits
        except Exception:
            log.warning("Triton's attention kernel cannot be used; decoding takes the slower masked one", exc_info=True)
            return None

    def _linear_kernel_works(self) -> bool:
        """Try Triton's linear layer on the first block, unless torch's is faster; a failure is a warning."""
        block, n, bfloat16 = self.network.blocks[0], self.slots, self.kv.dtype == torch.bfloat16
        try:
            from igpt_ray.generate.triton_linear import MAX_FLOAT32_ROWS, MAX_ROWS, MAX_WIDTH

            int8 = block.attn.c_attn.weight.dtype == torch.int8
            wide = n > 1 and block.attn.c_attn.weight.shape[1] > MAX_WIDTH and not int8
            if wide or n > (MAX_ROWS if bfloat16 else MAX_FLOAT32_ROWS):
                return False
            h, positions = self.network.wpe[:1].expand(n, 1, -1), torch.zeros(n, dtype=torch.long, device=self.device)
            rope = None if self.rope is None else self.rope[:, positions, None, None]
            decode_block(block, h, rope, self.kv[0], positions, None, self.splits, fused=True)
            return True
        except Exception:
            log.warning("Triton's linear layer cannot be used; decoding takes torch's", exc_info=True)
            return False

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


def _attend_from_the_start(kv: Tensor, slots: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (prompts, N, S, D) that stores keys and values of the first prompts in `slots` of `kv`."""
    n, S = len(slots), q.shape[2]
    kv[:, slots, :, :S] = torch.stack([k[:n], v[:n]])
    return sdpa(q, k, v, causal=True)


def without_cudnn() -> AbstractContextManager[None]:
    """Attention without cuDNN, which builds a plan for each new shape, for example for each length of a prompt."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


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
