"""The start and the end of a decode step in Triton: input embeddings, and sampling without top_k and top_p.

Each is one kernel instead of about ten and twenty. Tried with Triton 3.6.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _embed(tokens, positions, wte, wpe, sos, out, POSITIONS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + slot)
    previous = tl.load(tokens + slot * POSITIONS + position - 1, mask=position > 0, other=0)
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    token = tl.load(wte + previous * WIDTH + columns, mask=inside & (position > 0), other=0)
    start = tl.load(sos + columns, mask=inside & (position == 0), other=0)
    place = tl.load(wpe + position * WIDTH + columns, mask=inside, other=0)
    total = token.to(tl.float32) + start.to(tl.float32) + place.to(tl.float32)
    tl.store(out + slot * WIDTH + columns, total, mask=inside)


def embed(tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor, sos: Tensor) -> Tensor:
    """Input embeddings (slots, C) at `positions` (slots,), with the tokens before them from `tokens` (slots, T)."""
    (slots, T), C = tokens.shape, wpe.shape[1]
    out = torch.empty(slots, C, dtype=wpe.dtype, device=wpe.device)
    with torch.cuda.device_of(out):
        _embed[slots,](tokens, positions, wte, wpe, sos, out, POSITIONS=T, WIDTH=C, PADDED=triton.next_power_of_2(C))
    return out


@triton.jit
def _sample(
    logits, uniforms, temperature, prompt_mask, tokens, positions, active,
    POSITIONS: tl.constexpr, COLOURS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + slot)
    here = slot * POSITIONS + position
    colours = tl.arange(0, PADDED)
    inside = colours < COLOURS
    x = tl.load(logits + slot * COLOURS + colours, mask=inside, other=-float("inf")).to(tl.float64)
    divisor = tl.load(temperature + slot)
    below = (x - tl.max(x, 0)) / tl.where(divisor > 0, divisor, 1.0)
    cumulative = tl.cumsum(tl.where(inside, tl.exp(below), 0.0), 0)
    target = tl.load(uniforms + here) * tl.max(cumulative, 0)
    sampled = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), 0), COLOURS - 1)
    sampled = tl.where(divisor > 0, sampled, tl.argmax(x, 0)).to(tl.int64)
    is_prompt = tl.load(prompt_mask + here) != 0
    tl.store(tokens + here, sampled, mask=is_prompt == 0)
    tl.store(positions + slot, tl.minimum(position + tl.load(active + slot), POSITIONS - 1))


def sample(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    prompt_mask: Tensor,
    tokens: Tensor,
    positions: Tensor,
    active: Tensor,
) -> None:
    """`sampler.sample` of each slot's colour into `tokens` (slots, T), except at prompt pixels; then the next position.

    `positions` grow by `active`, up to the last position. Computes in float64. The arguments are the state of a
    `DeviceLoop`.
    """
    (slots, T), V = tokens.shape, logits.shape[1]
    with torch.cuda.device_of(logits):
        _sample[slots,](
            logits.contiguous(),
            uniforms,
            temperature,
            prompt_mask,
            tokens,
            positions,
            active,
            POSITIONS=T,
            COLOURS=V,
            PADDED=triton.next_power_of_2(V),
        )
