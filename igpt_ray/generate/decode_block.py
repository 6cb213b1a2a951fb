"""A transformer block on one query of every slot, as a function of tensors alone: for CUDA graphs and torch.compile."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_ray.model.image_gpt import Block, apply_rope


def decode_block(
    block: Block,
    h: Tensor,
    rope: Tensor | None,
    kv: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    splits: int | None,
    fused: bool,
) -> Tensor:
    """The block's output for h (slots, 1, C); keys and values are written to kv (2, slots, N, T, D) at `positions`.

    With `splits`, attention is `triton_kernels.decode_attention`; without, `bias` (slots, 1, 1, T) is -inf at the
    positions that a slot has not reached. `fused`: the linear layers are the kernel of `triton_linear`.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if splits is not None:
            return torch.ops.igpt.decode_attention(kv, q, k, v, positions, splits)
        rows = torch.arange(len(positions), device=positions.device)
        kv[:, rows, :, positions] = torch.stack([k[:, :, 0], v[:, :, 0]], dim=1)  # (slots, 2, N, D)
        return F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=bias)

    if not fused:
        return block(h, rope, attend)
    (n, _, C), attn, h = h.shape, block.attn, h[:, 0]
    qkv = few_rows_linear(attn.c_attn, h, gain=block.ln_1.weight)
    q, k, v = qkv.view(n, 3, attn.n_head, 1, -1).unbind(1)  # each (slots, N, 1, D)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    h = few_rows_linear(attn.c_proj, attend(q, k, v).view(n, C), residual=h)
    hidden = few_rows_linear(block.mlp.c_fc, h, gain=block.ln_2.weight, gelu=True)
    return few_rows_linear(block.mlp.c_proj, hidden, residual=h)[:, None]


def few_rows_linear(
    layer: nn.Module, x: Tensor, gain: Tensor | None = None, residual: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """A linear layer, int8 or not, with the RMS norm of `gain` before it."""
    return torch.ops.igpt.linear_of_few_rows(x, layer.weight, getattr(layer, "scale", None), gain, residual, gelu)


@cache
def compiled_block() -> Callable[..., Tensor]:
    """`decode_block` by torch.compile. All caches share it, and equal shapes are compiled once."""
    return torch.compile(decode_block, fullgraph=True, dynamic=False)
