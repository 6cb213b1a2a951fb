"""A decode step as a CUDA graph."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A layer's cache, q, k and v -> the output of attention."""


class CUDAGraph:
    """A decode step of all slots, active or not, recorded once and replayed: one launch instead of hundreds.

    The shapes in a graph are fixed, so attention covers all positions and masks those that a slot has not reached.
    """

    def __init__(
        self, n_slots: int, n_positions: int, device: torch.device, forward: Callable[[Tensor, Tensor, Attend], Tensor]
    ):
        """`forward` takes positions (slots,), previous tokens (slots,) and attention; it returns logits (slots, V)."""
        self.forward = forward
        self.positions = torch.zeros(n_slots, dtype=torch.long, device=device)
        self.previous_tokens = torch.zeros_like(self.positions)
        self.all = torch.arange(n_slots, device=device)
        self.all_positions = torch.arange(n_positions, device=device)
        self.recorded: torch.cuda.CUDAGraph | None = None

    def decode_step(self, slots: Sequence[int], positions: Sequence[int], previous_tokens: Sequence[int]) -> Tensor:
        rows = self.set_inputs(slots, positions, previous_tokens)
        if self.recorded is None:
            self._record()
        assert self.recorded is not None
        self.recorded.replay()
        return self.out[rows]

    def set_inputs(self, slots: Sequence[int], positions: Sequence[int], previous_tokens: Sequence[int]) -> Tensor:
        """Copy the positions and previous tokens of the active slots to the device; returns the slots' indices."""
        rows, at, previous = torch.tensor(
            [list(slots), list(positions), list(previous_tokens)], device=self.positions.device
        )
        self.positions.zero_()
        self.positions[rows] = at
        self.previous_tokens[rows] = previous
        return rows

    def _record(self) -> None:
        """Record the graph, after one warm-up run on another stream, as torch requires."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.recorded):
            self.out = self.run()

    def run(self) -> Tensor:
        """Logits (slots, V). An inactive slot overwrites its position 0, which is written again before use."""
        reached = self.all_positions <= self.positions[:, None]  # (slots, T)
        return self.forward(self.positions, self.previous_tokens, partial(self._attend, reached[:, None, None]))

    def _attend(self, reached: Tensor, kv: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv[:, self.all, :, self.positions] = torch.stack([k[:, :, 0], v[:, :, 0]], dim=1)
        return F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=reached)
