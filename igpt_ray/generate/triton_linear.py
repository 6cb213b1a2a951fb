"""A linear layer on few rows in Triton, with the norm before it and the GELU or the residual sum after it.

At 32 rows or fewer a product takes as long as reading its weights, and launches take longer than that: a block of the
network is four of these kernels and the attention, instead of about eighteen. Tried with Triton 3.6.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from igpt_ray.generate.triton_kernels import overlap_options
from igpt_ray.model.image_gpt import NORM_EPS

MAX_ROWS = 32
MAX_FLOAT32_ROWS = 8
"""In float32, and for one row, products are sums of elements without the tensor cores: each row costs as much again."""
MAX_WIDTH = 768
"""Widest network whose steps of several rows are faster than with cuBLAS. On an H200 a step of 32 rows takes 1.2 ms
against 1.4 ms at a width of 512 (iGPT-S), and 8.6 ms against 6.8 ms at 1,536 (iGPT-L); 1,024 was not measured."""
GELU_SLOPE = tl.constexpr(1.702)
"""OpenAI's GELU is x * sigmoid(1.702 x)."""


@triton.jit
def _linear(
    x, weight, scale, gain, residual, out, rows, OUTPUTS, eps,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    SCALE: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, GELU: tl.constexpr, WIDEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT outputs of all rows. ROWS is `rows` or, with DOT, on the tensor cores, the next multiple of 16.

    The norm divides by the root of a row's mean square, which is computed in the same loop and applied to the sums.
    """
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, ROWS)
    sums, squares = tl.zeros([ROWS, BLOCK_OUT], tl.float32), tl.zeros([ROWS], tl.float32)
    if OVERLAP:
        gdc_launch_dependents()
    if OVERLAP and DOT:  # outside the loop, which is pipelined
        gdc_wait()
    for first in range(0, INPUTS, BLOCK_IN):
        column = first + tl.arange(0, BLOCK_IN)
        inside = column < INPUTS
        used = (outputs < OUTPUTS)[:, None] & inside[None, :]
        w = tl.load(weight + outputs[:, None] * INPUTS + column[None, :], mask=used, other=0)
        if OVERLAP and not DOT:
            gdc_wait()
        gains = tl.full([BLOCK_IN], 1.0, tl.float32)
        if NORM:
            gains = tl.load(gain + column, mask=inside, other=0).to(tl.float32)
        if DOT:
            here = (row < rows)[:, None] & inside[None, :]
            values = tl.load(x + row[:, None] * INPUTS + column[None, :], mask=here, other=0)
            if NORM:
                squares += tl.sum(values.to(tl.float32) * values.to(tl.float32), 1)
                values = (values.to(tl.float32) * gains[None, :]).to(values.dtype)
            w = w.to(tl.float32).to(values.dtype)  # the interpreter cannot convert int8 to bfloat16 directly
            if WIDEN:
                values, w = values.to(tl.float32), w.to(tl.float32)
            sums = tl.dot(values, tl.trans(w), sums)
        else:
            for r in tl.static_range(ROWS):
                values = tl.load(x + r * INPUTS + column, mask=inside & (r < rows), other=0).to(tl.float32)
                square = tl.sum(values * values, 0) if NORM else 0.0
                part = tl.sum(w.to(tl.float32) * (values * gains)[None, :], 1)
                sums += tl.where((row == r)[:, None], part[None, :], 0.0)
                squares += tl.where(row == r, square, 0.0)
    if SCALE:
        sums *= tl.load(scale + outputs, mask=outputs < OUTPUTS, other=0).to(tl.float32)[None, :]
    if NORM:
        sums *= tl.rsqrt(squares / INPUTS + eps)[:, None]
    if GELU:
        sums *= tl.sigmoid(GELU_SLOPE * sums)
    where = row[:, None] * OUTPUTS + outputs[None, :]
    stored = (row < rows)[:, None] & (outputs < OUTPUTS)[None, :]
    if RESIDUAL:
        sums += tl.load(residual + where, mask=stored, other=0).to(tl.float32)
    tl.store(out + where, sums, mask=stored)


@torch.library.custom_op(
    "igpt::linear_of_few_rows",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? scale, Tensor? gain, Tensor? residual, bool gelu) -> Tensor",
)
def linear_of_few_rows(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor | None, residual: Tensor | None, gelu: bool
) -> Tensor:
    """gelu(norm(x) @ (weight * scale)^T) + residual: x (rows, in), weight (out, in) -> (rows, out).

    `weight` has the type of x or is int8 with a `scale` (out,) per output. `gain` (in,) is that of the RMS norm, which
    is left out without it. A row's result does not depend on other rows. Sums are in float32.
    """
    (rows, inputs), outputs = x.shape, len(weight)
    dot = x.dtype == torch.bfloat16 and rows > 1
    block_out = 16 if dot else 4 if outputs <= 1024 else 8
    block_in = 256 if dot else 8192 // block_out if rows == 1 else 512
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    none = out
    with torch.cuda.device_of(x):
        _linear[triton.cdiv(outputs, block_out),](
            x.contiguous(),
            weight,
            none if scale is None else scale,
            none if gain is None else gain,
            none if residual is None else residual.contiguous(),
            out,
            rows,
            outputs,
            NORM_EPS,
            INPUTS=inputs,
            ROWS=triton.cdiv(rows, 16) * 16 if dot else triton.next_power_of_2(rows),
            DOT=dot,
            BLOCK_OUT=block_out,
            BLOCK_IN=min(block_in, max(16, triton.next_power_of_2(inputs))),
            SCALE=scale is not None,
            NORM=gain is not None,
            RESIDUAL=residual is not None,
            GELU=gelu,
            WIDEN=not x.is_cuda,  # the interpreter of Triton 3.6 multiplies bfloat16 as integers
            **overlap_options(x),
        )
    return out


@linear_of_few_rows.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor | None, residual: Tensor | None, gelu: bool
) -> Tensor:
    return torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
