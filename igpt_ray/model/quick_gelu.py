"""OpenAI's GELU, x * sigmoid(1.702 x) (`gelu` in `src/model.py` of Image GPT), with a backward pass that saves only x.

torch's autograd would save x, 1.702 x's sigmoid and, as the input of the next product, the result: 3 x 4C elements per
position and block. On a GPU, the three operators of the forward pass and the five of the backward pass read and write
168 bytes per element of C in bfloat16; the Triton kernels read and write 40.
"""

import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), in the dtype of x. It has no second derivative, except under torch.compile.

    torch.compile gets the formula, which it fuses with its neighbours. Eager mode uses Triton kernels on CUDA, and
    torch's operators where there is no Triton, on a CPU and in float64.
    """
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(1.702 * x)
    return QuickGELU.apply(x)


class QuickGELU(torch.autograd.Function):
    """On a CPU, values and gradients have the bits of autograd's: the same operators run in the same order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if kernels := _kernels_for(x):
            return kernels.forward(x)
        return (1.702 * x).sigmoid_().mul_(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if kernels := _kernels_for(x):
            return kernels.backward(x, grad.contiguous())
        s, through_s = (1.702 * x).sigmoid_(), grad * x
        torch.ops.aten.sigmoid_backward.grad_input(through_s, s, grad_input=through_s)
        return through_s.mul_(1.702).add_(s.mul_(grad))


def _kernels_for(x: Tensor) -> ModuleType | None:
    """The Triton kernels if they can compute with x. They read memory, which a FakeTensor does not have."""
    return triton_kernels() if x.is_cuda and type(x) is Tensor and x.is_contiguous() and x.itemsize < 8 else None


@cache
def triton_kernels() -> ModuleType | None:
    """`quick_gelu_triton`, after a trial on the current CUDA device; None, with a warning, if the trial fails.

    Triton's kernels need its package and, to build the launcher, a C compiler.
    """
    try:
        from igpt_ray.model import quick_gelu_triton

        x = torch.ones(1, device="cuda", dtype=torch.bfloat16)
        quick_gelu_triton.backward(x, quick_gelu_triton.forward(x))
    except Exception as error:  # of the import, of the compilers (subprocesses) or of the driver
        log.warning("GELU runs without Triton, which is slower and needs no change of settings: %r", error)
        return None
    return quick_gelu_triton
