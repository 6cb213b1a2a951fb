"""Parallelism, applied to a plain model: FSDP2 on any number of ranks, including one; HSDP if configured."""

import logging
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
from igpt_ray.model.image_gpt import ImageGPT, outline
from igpt_ray.train.config import WorkersConfig
from igpt_ray.train.torch_compat import fake_store

log = logging.getLogger(__name__)


def mesh_of(device_type: str, fsdp_size: int | None) -> DeviceMesh:
    """Mesh of all ranks, or of replicas x `fsdp_size`. None shards over all ranks.

    If `fsdp_size` does not divide the number of ranks, the greatest common divisor is used.
    """
    n = dist.get_world_size()
    fsdp_size = math.gcd(n, fsdp_size) if fsdp_size else n
    if fsdp_size == n:
        return init_device_mesh(device_type, (n,))
    return init_device_mesh(device_type, (n // fsdp_size, fsdp_size), mesh_dim_names=("replicate", "shard"))


def shard(model: ImageGPT, mesh: DeviceMesh, workers: WorkersConfig) -> ImageGPT:
    """Shard every block, then the rest, over `mesh` in place. With a 2-D mesh, each row holds a replica.

    Blocks are gathered one at a time in the forward and the backward pass; embeddings and output layer, which are used
    first and last, stay gathered in between. Parameters are stored in float32 and cast to `precision` when they are
    gathered; gradients are reduced in float32. Activation checkpointing and torch.compile are applied to the forward
    method of a block, so that parameters keep their names.
    """
    workers = workers.resolved(on_gpu=mesh.device_type == "cuda")
    compiled = workers.compile and _compiler_works(mesh.device_type)
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, workers.precision), reduce_dtype=torch.float32)
    for block in model.blocks:
        if workers.activation_checkpointing != "none":
            how: dict[str, Any] = {"use_reentrant": False}
            if workers.activation_checkpointing == "selective":
                how["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
            block.forward = partial(checkpoint, block.forward, **how)  # type: ignore[method-assign]
        if compiled:  # dynamic: kernels for any number of images are slower, and only few numbers occur
            block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "forward_with_classifier")  # gathers the weights
    return model


def _compiler_works(device_type: str) -> bool:
    """Compile and run a small function. If that fails, log a warning: training without compilation is only slower."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device_type))
    except Exception as error:  # of torch, of Triton, or of a subprocess
        log.warning(
            "torch.compile does not work here, so the blocks are not compiled, which is slower: install Triton and a C"
            " compiler (on a CPU, a C++ compiler), or use --workers.compile False. %s: %s",
            *(type(error).__name__, str(error).strip().split("\n")[0]),
        )
        return False
    return True


PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
"""Operators whose outputs selective activation checkpointing keeps."""


def _keep_products(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """Policy of selective activation checkpointing: norms and activations are recomputed from matrix products."""
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def reduce_gradients(model: ImageGPT, now: bool) -> None:
    """Set whether the next backward pass reduces gradients over the ranks, or only accumulates them locally."""
    cast(FSDPModule, model).set_requires_gradient_sync(now)


def sharding_dry_run(model: ModelConfig, workers: WorkersConfig) -> tuple[int, int]:
    """The least and the largest number of parameters on one rank of `workers`, from a dry run of the sharding.

    Uses torch's fake process group for the first and the last rank, and tensors without memory (meta). The calling
    process must have no process group.
    """
    held, workers = [], workers.model_copy(update={"compile": False})
    for rank in (workers.fsdp_size - 1, 0):  # rows are split in equal parts, and the last rank gets the rest
        dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=workers.n)
        network = shard(outline(model), mesh_of("cpu", workers.shard), workers)
        held.append(sum(cast(DTensor, p).to_local().numel() for p in network.parameters()))
        dist.destroy_process_group()
    return held[0], held[1]
