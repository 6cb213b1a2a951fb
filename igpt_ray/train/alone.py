"""Training in this process alone, without Ray: one rank, on one device."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from igpt_ray.train import loop, metrics
from igpt_ray.train.config import PretrainConfig


def train_alone(
    cfg: PretrainConfig, device: torch.device, on_metrics: Callable[[metrics.Line], None] = lambda line: None
) -> dict[str, Any]:
    """`loop.train` in a process group of one rank: nccl on a CUDA device, gloo on the CPU.

    The process must have no process group; there is none afterwards, also if training fails.
    """
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # of nccl's collectives
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        return loop.train(cfg, device, on_metrics=on_metrics)
    finally:
        dist.destroy_process_group()
