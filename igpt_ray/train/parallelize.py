"""Parallelism, applied from outside to a plain model: FSDP2 on every worker count, one included; HSDP on many."""

import math
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train.config import WorkersConfig


def mesh_of(device_type: str, sharing: int) -> DeviceMesh:
    """All workers, or copies x `sharing` workers that share one; the largest common divisor if they do not divide."""
    n = dist.get_world_size()
    sharing = math.gcd(n, sharing) if sharing else n
    if sharing == n:
        return init_device_mesh(device_type, (n,))
    return init_device_mesh(device_type, (n // sharing, sharing), mesh_dim_names=("replicate", "shard"))


def shard(model: ImageGPT, mesh: DeviceMesh, workers: WorkersConfig) -> ImageGPT:
    """Shard every block, then the rest, over `mesh`, or over its rows, which are then copies of each other, in place.

    Blocks are gathered one at a time on the way in and out; embeddings and head, used first and last, stay gathered
    in between. Parameters rest in float32 and are cast to `precision` as they are gathered; gradients are reduced in
    float32. What recomputes and what is compiled is the inside of a block, so that parameters keep their names.
    """
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, workers.precision), reduce_dtype=torch.float32)
    for block in model.blocks:
        if workers.recompute != "none":
            how: dict[str, Any] = {"use_reentrant": False}
            if workers.recompute == "selective":
                how["context_fn"] = partial(create_selective_checkpoint_contexts, _products_kept)
            block.forward = partial(checkpoint, block.forward, **how)  # type: ignore[method-assign]
        if workers.compile:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "forward_with_classifier")  # it too gathers the weights first
    return model


PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
"""What costs too much to be done again."""


def _products_kept(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """For torch's selective checkpoint: norms and activations are made again from what products give."""
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def reduce_gradients(model: ImageGPT, now: bool) -> None:
    """Whether the next backward pass reduces gradients over the workers, or only adds to this worker's sum."""
    cast(FSDPModule, model).set_requires_gradient_sync(now)


def rehearsal(model: ModelConfig, workers: WorkersConfig) -> tuple[int, int]:
    """The fewest and the most parameters that one of `workers` will hold. For a process without a process group.

    Sharded as in earnest, but by one process that stands for the others in turn (torch's fake process group), and
    without memory (meta).
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    held = []
    for rank in (workers.sharing - 1, 0):  # torch deals rows out in equal parts, so what is left over is the last's
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=workers.n)
        with torch.device("meta"):
            network = ImageGPT(model)
        shard(network, mesh_of("cpu", workers.shard), workers)
        held.append(sum(cast(DTensor, p).to_local().numel() for p in network.parameters()))
        dist.destroy_process_group()
    return held[0], held[1]
