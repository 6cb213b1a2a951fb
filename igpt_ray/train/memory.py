"""Free memory of the workers, and the micro-batch that fits into it."""

import logging
import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from igpt_ray.train import estimate
from igpt_ray.train.config import PretrainConfig

log = logging.getLogger(__name__)


def micro_batch_that_fits(cfg: PretrainConfig, device: torch.device) -> int:
    """The largest micro-batch that fits into the memory of every worker, by `estimate.py`. Every rank must call it.

    Workers without GPUs share the memory of their host.
    """
    world_size = dist.get_world_size()
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, (socket.gethostname(), _free_bytes(device)))
    hosts = [host for host, _ in everyone]
    free = min(b if device.type == "cuda" else b / hosts.count(host) for host, b in everyone)
    share_of_batch = math.ceil(cfg.optim.batch_size / world_size)
    n = estimate.images_that_fit(cfg.model, cfg.optim, cfg.workers, share_of_batch, free)
    if dist.get_rank() == 0:
        log.info("micro-batches of %d image(s): %.1f GB are free for a worker", n, free / estimate.GB)
    return n


def _free_bytes(device: torch.device) -> float:
    """Free memory of the device, or what the host and its container leave for this process."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    limit = Path("/sys/fs/cgroup/memory.max")  # the limit of a container, which /proc/meminfo does not show
    allowed = limit.read_text().strip() if limit.exists() else "max"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = float(available[1]) * 1024 if available else float(memory)
    return free if allowed == "max" else min(free, float(allowed))
