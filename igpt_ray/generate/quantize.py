"""Weights for decoding: packed for oneDNN, or int8 with a scale per output."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_ray.model.image_gpt import ImageGPT, outline

Precision = Literal["float32", "bfloat16", "int8"]
"""Type of weights, keys and values. With int8, the weights of linear layers are int8 and all else is bfloat16."""
PACKED_ROWS = 32
"""Batch size that the weights are packed for. Fixed, because another packing sums in another order and changes the last
bits. For more rows, torch's int8 product takes several times as long as bfloat16's."""


def prepare_network(model: ImageGPT, precision: Precision) -> ImageGPT:
    """A copy of `model` whose matrix products are fast for few rows. Tensors that need no conversion are shared."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    network = outline(model.config).eval().requires_grad_(False)
    state = model.state_dict()
    network.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
    onednn = torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    packed = model.wpe.device.type == "cpu" and onednn
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and (packed or precision == "int8"):
            network.set_submodule(name, Int8(state[f"{name}.weight"]) if precision == "int8" else Packed(module.weight))
    return network


class Packed(nn.Module):
    """A linear layer whose weight is packed for oneDNN once, instead of in every call.

    At iGPT-S's sizes it is a third faster, for 1 row as for 32. torch.compile uses the same operators.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class Int8(nn.Module):
    """A linear layer with int8 weights and one bfloat16 scale per output. Inputs are bfloat16.

    On CUDA the weights are converted to bfloat16 in each call: torch 2.11's kernel returns float32, and is slower.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127  # (out,)
        self.scale = scale.to(torch.bfloat16)
        self.weight = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > PACKED_ROWS or x.is_cuda:  # bfloat16 represents the integers up to 127 exactly
            y = F.linear(rows, self.weight.to(torch.bfloat16)) * self.scale
        else:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        return y.view(*x.shape[:-1], -1)
