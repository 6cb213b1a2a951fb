"""A worker's part of a global batch, on its device, in forward passes that fit into its memory."""

import logging
import math
import os
import re
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from igpt_ray.data.augment import Augment
from igpt_ray.data.loader import Batch, SplitCache, share
from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.rng import seed_of
from igpt_ray.train import estimate
from igpt_ray.train.config import PretrainConfig

log = logging.getLogger(__name__)


class MicroBatch(NamedTuple):
    """What one forward pass takes."""

    batch: Batch
    tokens: Tensor  # (B, T) int64
    keep: Tensor | None  # (B, T) bool, for a masked network
    weight: int
    """1, or 0 for a pass that only keeps step with other workers, on an image that is not this one's."""
    labels: Tensor | None = None  # (B,) int64, for fine-tuning


@dataclass(frozen=True)
class MicroBatchLoader:
    """A worker's part of any global batch, in forward passes of at most `micro_batch` images."""

    images: SplitCache
    model: ModelConfig
    seed: int
    micro_batch: int
    device: torch.device
    augment: Augment | None = None

    def beside(self, images: SplitCache) -> "MicroBatchLoader":
        """The same for another split, whose images are left as they are."""
        return replace(self, images=images, augment=None)

    def micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """This worker's passes over its part of a batch."""
        parts = passes(batch, dist.get_rank(), dist.get_world_size(), self.micro_batch)
        idle = Batch(batch.epochs[:1], batch.rows[:1])
        return [self._micro(part, 1) if len(part.rows) else self._micro(idle, 0) for part in parts]

    def _micro(self, batch: Batch, weight: int) -> MicroBatch:
        images = self.images[batch]
        if self.augment is not None:
            images = self.augment(images, self.seed, batch)
        tokens = self._there(torch.from_numpy(images.astype(np.int64)))
        masked, labelled = self.model.objective == "masked", self.model.n_class > 0
        keep = self._there(sample_masks(self.seed, batch, self.model.n_positions)) if masked else None
        labels = self._there(torch.from_numpy(self.images.labels_of(batch))) if labelled else None
        return MicroBatch(batch, tokens, keep, weight, labels)

    def _there(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)


def passes(batch: Batch, rank: int, world_size: int, micro_batch: int) -> list[Batch]:
    """A worker's contiguous part of a batch, which need not be divisible, in parts of at most `micro_batch` images.

    All workers take as many passes, or their collectives would not meet: some may be empty.
    """
    n = math.ceil(math.ceil(len(batch.rows) / world_size) / micro_batch)
    mine = share(batch, rank, world_size)
    return [share(mine, i, n) for i in range(n)]


def sample_masks(seed: int, batch: Batch, n_positions: int) -> Tensor:
    """The masks of a batch, a function of (seed, epoch, row): the same on any number of workers. (B, T) bool."""
    rows = zip(batch.epochs.tolist(), batch.rows.tolist(), strict=True)
    return losses.sample_masks([seed_of(seed, epoch, row) for epoch, row in rows], n_positions)


def micro_batch_that_fits(cfg: PretrainConfig, device: torch.device) -> int:
    """By `estimate.py`, for the worker that has least memory; workers of one machine without GPUs share its memory."""
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
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container, which /proc does not know
    allowed = limit.read_text().strip() if limit.exists() else "max"
    there = float(available[1]) * 1024 if available else float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return there if allowed == "max" else min(there, float(allowed))
