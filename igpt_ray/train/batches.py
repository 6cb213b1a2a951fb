"""A rank's part of a global batch, on its device, as micro-batches that fit into its memory."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from igpt_ray.data.augment import Augment
from igpt_ray.data.loader import Batch, SplitCache, share
from igpt_ray.data.token_store import evenly
from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.rng import seed_of


class MicroBatch(NamedTuple):
    """The input of one forward pass."""

    batch: Batch
    tokens: Tensor  # (B, T) int64
    visible_mask: Tensor | None  # (B, T) bool, for the masked objective
    weight: int
    """1 for real data; 0 for a dummy micro-batch, run only so that every rank issues the same collectives."""
    labels: Tensor | None = None  # (B,) int64, for fine-tuning

    def loss_sums(self, model: ImageGPT) -> Tensor:
        """`losses.loss_sums` of this micro-batch, zero if it is a dummy."""
        return self.weight * losses.loss_sums(model, self.tokens, self.labels, self.visible_mask)


@dataclass(frozen=True)
class MicroBatchLoader:
    """Micro-batches, of at most `micro_batch` images, of this rank's part of a global batch."""

    images: SplitCache
    model: ModelConfig
    seed: int
    micro_batch: int
    device: torch.device
    augment: Augment | None = None

    def with_images(self, images: SplitCache) -> "MicroBatchLoader":
        """The same loader for another split, without augmentation."""
        return replace(self, images=images, augment=None)

    def micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """The micro-batches of this rank. Every rank gets the same number."""
        parts = passes(batch, dist.get_rank(), dist.get_world_size(), self.micro_batch)
        dummy = Batch(batch.epochs[:1], batch.rows[:1])
        return [self._micro(part, 1) if len(part.rows) else self._micro(dummy, 0) for part in parts]

    def _micro(self, batch: Batch, weight: int) -> MicroBatch:
        images = self.images[batch]
        if self.augment is not None:
            images = self.augment(images, self.seed, batch)
        tokens = self._to_device(torch.from_numpy(images.astype(np.int64)))
        masked, labelled = self.model.objective == "masked", self.model.n_class > 0
        visible_mask = self._to_device(sample_masks(self.seed, batch, self.model.n_positions)) if masked else None
        labels = self._to_device(torch.from_numpy(self.images.labels_of(batch))) if labelled else None
        return MicroBatch(batch, tokens, visible_mask, weight, labels)

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)


def passes(batch: Batch, rank: int, world_size: int, micro_batch: int) -> list[Batch]:
    """A rank's contiguous part of a batch, in parts of at most `micro_batch` images. Nothing needs to be divisible.

    Every rank gets the same number of parts, so that collectives match; some parts may be empty.
    """
    n = math.ceil(math.ceil(len(batch.rows) / world_size) / micro_batch)
    mine = share(batch, rank, world_size)
    return [share(mine, i, n) for i in range(n)]


def evenly_spaced_batch(split: SplitCache, n: int) -> Batch:
    """At most n evenly spaced images of a split, the same at every step."""
    rows = evenly(len(split), n)
    return Batch(np.zeros_like(rows), rows)


def sample_masks(seed: int, batch: Batch, n_positions: int) -> Tensor:
    """Masks (B, T) bool of a batch, a function of (seed, epoch, row): the same on any number of ranks."""
    rows = zip(batch.epochs.tolist(), batch.rows.tolist(), strict=True)
    return losses.sample_masks([seed_of(seed, epoch, row) for epoch, row in rows], n_positions)
