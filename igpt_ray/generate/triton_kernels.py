"""Triton kernels for decoding. Importing this module imports Triton, which torch's CUDA wheels install.

The kernels are custom operators, so that torch.compile does not look into them. Tried with Triton 3.6.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK = tl.constexpr(64)
"""Positions that a program reads at once: with a head width of 64, 16 KiB of keys and values in bfloat16."""
MAX_SPLITS = 16
OVERLAP_LAUNCHES = False
"""Whether a kernel may start before the one before it has ended: CUDA's programmatic dependent launch, from Hopper on.

A kernel then waits at `gdc_wait`, and may read nothing but weights before. The setting is read when a step is recorded.
"""


def overlap_options(x: Tensor) -> dict[str, Any]:
    """Arguments of a launch on the device of x: the constant OVERLAP and Triton's option."""
    overlap = OVERLAP_LAUNCHES and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}


@triton.jit
def _attend_split(
    cache, q, k, v, positions, out, statistics, cache_values, q_slot, k_slot, v_slot,
    POSITIONS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention of one query over one of SPLITS equal parts of its positions, with an online softmax.

    The part that contains the query's own position takes its key and value from `k` and `v` and writes them to the
    cache. With several parts, `out` holds unnormalised sums, and `statistics` what `_combine` needs.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    slot, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = slot * tl.num_programs(1) + head
    position = tl.load(positions + slot).to(tl.int32)
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    query = tl.load(q + slot * q_slot + head * WIDTH + columns, mask=inside, other=0).to(tl.float32) * WIDTH**-0.5
    own_key = tl.load(k + slot * k_slot + head * WIDTH + columns, mask=inside, other=0)
    own_value = tl.load(v + slot * v_slot + head * WIDTH + columns, mask=inside, other=0)

    part = tl.cdiv(position + 1, SPLITS)
    first, end = split * part, tl.minimum(split * part + part, position + 1)
    keys_of_head = cache + row * POSITIONS * WIDTH + columns
    values_of_head = keys_of_head + cache_values
    own = inside & (first <= position) & (position < end)
    tl.store(keys_of_head + position * WIDTH, own_key, mask=own)
    tl.store(values_of_head + position * WIDTH, own_value, mask=own)

    largest, total = tl.full([], -float("inf"), tl.float32), tl.full([], 0, tl.float32)
    weighted = tl.zeros([PADDED], tl.float32)
    while first < end:  # the interpreter of Triton 3.6 cannot run `for` with numpy 2.4
        at = first + tl.arange(0, BLOCK)
        stored = (at < tl.minimum(end, position))[:, None] & inside[None, :]
        keys = tl.load(keys_of_head[None, :] + at[:, None] * WIDTH, mask=stored, other=0).to(tl.float32)
        values = tl.load(values_of_head[None, :] + at[:, None] * WIDTH, mask=stored, other=0).to(tl.float32)
        keys = tl.where((at == position)[:, None], own_key.to(tl.float32)[None, :], keys)
        values = tl.where((at == position)[:, None], own_value.to(tl.float32)[None, :], values)
        scores = tl.where(at < end, tl.sum(keys * query[None, :], 1), -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        weights, rescale = tl.exp(scores - new_largest), tl.exp(largest - new_largest)
        weighted = weighted * rescale + tl.sum(weights[:, None] * values, 0)
        total = total * rescale + tl.sum(weights, 0)
        largest = new_largest
        first += BLOCK

    row = row * SPLITS + split
    if SPLITS == 1:
        tl.store(out + row * WIDTH + columns, weighted / total, mask=inside)
    else:
        tl.store(out + row * WIDTH + columns, weighted, mask=inside)
        tl.store(statistics + 2 * row, largest)
        tl.store(statistics + 2 * row + 1, total)


@triton.jit
def _combine(
    parts, statistics, out,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention of a query from the parts of its positions. A part without positions has the weight 0."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    query = tl.program_id(0).to(tl.int64)
    columns, rows = tl.arange(0, PADDED), query * SPLITS + tl.arange(0, SPLITS)
    inside = columns < WIDTH
    largest = tl.load(statistics + 2 * rows)
    weights = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(weights * tl.load(statistics + 2 * rows + 1), 0)
    weighted = tl.load(parts + rows[:, None] * WIDTH + columns[None, :], mask=inside[None, :], other=0)
    tl.store(out + query * WIDTH + columns, tl.sum(weights[:, None] * weighted, 0) / total, mask=inside)


@torch.library.custom_op("igpt::decode_attention", mutates_args=("cache",))
def decode_attention(cache: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, splits: int) -> Tensor:
    """Attention of one query per slot over the slot's own positions: q, k, v (slots, N, 1, D) -> (slots, N, 1, D).

    Writes the keys and values to `cache` (2, slots, N, T, D) at `positions` (slots,), and reads no later positions.
    `splits`, a power of 2, is the number of programs per head, see `splits_for`. A slot's result does not depend on
    other slots.
    """
    slots, heads, _, width = q.shape
    assert cache.is_contiguous(), "the kernel computes the addresses"
    q, k, v = (x if x.stride()[1::2] == (width, 1) else x.contiguous() for x in (q, k, v))
    out = torch.empty(slots, heads, 1, width, dtype=q.dtype, device=q.device)
    parts = statistics = out
    if splits > 1:
        parts = torch.empty(slots, heads, splits, width, dtype=torch.float32, device=q.device)
        statistics = torch.empty(slots, heads, splits, 2, dtype=torch.float32, device=q.device)
    shape: dict[str, Any] = {"WIDTH": width, "PADDED": triton.next_power_of_2(width), "SPLITS": splits}
    shape |= overlap_options(q)
    with torch.cuda.device_of(q):
        tensors = cache, q, k, v, positions, parts, statistics
        strides = cache.stride(0), q.stride(0), k.stride(0), v.stride(0)
        _attend_split[slots, heads, splits](*tensors, *strides, POSITIONS=cache.shape[3], **shape)
        if splits > 1:
            _combine[slots * heads,](parts, statistics, out, **shape)
    return out


@decode_attention.register_fake
def _(cache: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, splits: int) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def splits_for(slots: int, heads: int, device: torch.device) -> int:
    """Number of parts per head, a power of 2, that gives each multiprocessor three programs or more."""
    programs = 3 * torch.cuda.get_device_properties(device).multi_processor_count
    return min(MAX_SPLITS, triton.next_power_of_2(triton.cdiv(programs, slots * heads)))
