"""Parallelism, applied from outside to a plain model: FSDP2 on every worker count, one included."""

from functools import partial
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from igpt_ray import config
from igpt_ray.model import ImageGPT


def shard(model: ImageGPT, mesh: DeviceMesh, workers: config.Workers) -> ImageGPT:
    """Shard every block, then the rest, over `mesh`, in place.

    Blocks are gathered one at a time on the way in and out; embeddings and head, used first and last, stay gathered
    in between. Parameters rest in float32 and are cast to `precision` as they are gathered; gradients are reduced in
    float32. What recomputes and what is compiled is the inside of a block, so that parameters keep their names.
    """
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, workers.precision), reduce_dtype=torch.float32)
    for block in model.blocks:
        if workers.recompute == "full":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if workers.compile:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "joint")  # it too gathers the weights first
    return model


def reduce_gradients(model: ImageGPT, now: bool) -> None:
    """Whether the next backward pass reduces gradients over the workers, or only adds to this worker's sum."""
    cast(FSDPModule, model).set_requires_gradient_sync(now)
