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
    """The input of one forward pass of B images."""

    batch: Batch
    """The n <= B images that count. The others fill the pass: they have no part in losses and gradients. Without any
    image that counts, the pass runs only so that every rank issues the same collectives."""
    tokens: Tensor  # (B, T) int64
    visible_mask: Tensor | None  # (B, T) bool, for the masked objective
    labels: Tensor | None = None  # (B,) int64, for fine-tuning

    def loss_sums(self, model: ImageGPT) -> Tensor:
        """Sums over the n images of the quantities that `losses.sum_names` names: (1,), or (3,) with labels."""
        if self.labels is not None:
            parts = losses.loss_parts(model, self.tokens, self.labels, self.visible_mask)
        elif self.visible_mask is not None:
            parts = losses.masked_pixel(model(self.tokens, self.visible_mask), self.tokens, self.visible_mask)[None]
        else:
            parts = losses.next_pixel(model(self.tokens), self.tokens)[None]  # (1, B, T)
        return parts[:, : len(self.batch.rows)].flatten(1).sum(1)


@dataclass(frozen=True)
class MicroBatchLoader:
    """Micro-batches, of at most `micro_batch` images, of this rank's part of a global batch.

    With `equal`, every forward pass has exactly `micro_batch` images, so that compiled code sees one shape.
    """

    images: SplitCache
    model: ModelConfig
    seed: int
    micro_batch: int
    device: torch.device
    augment: Augment | None = None
    equal: bool = False

    def with_images(self, images: SplitCache) -> "MicroBatchLoader":
        """The same loader for another split, without augmentation."""
        return replace(self, images=images, augment=None)

    def micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """The micro-batches of this rank. Every rank gets the same number.

        On a CUDA device the copies may still be in progress; they precede later work on the current stream.
        """
        first = Batch(batch.epochs[:1], batch.rows[:1])
        parts = passes(batch, dist.get_rank(), dist.get_world_size(), self.micro_batch)
        return [self._micro(part, first) for part in parts]

    def _micro(self, batch: Batch, filler: Batch) -> MicroBatch:
        """A pass of the images of `batch`, filled with copies of one image to `micro_batch` images, or at least one."""
        n = max(0, (self.micro_batch if self.equal else 1) - len(batch.rows))
        filled = Batch(*(np.concatenate([a, b.repeat(n)]) for a, b in zip(batch, filler, strict=True)))
        images = self.images[filled]
        if self.augment is not None:
            images = self.augment(images, self.seed, filled)
        tokens = self._to_device(torch.from_numpy(images.astype(np.int64)))
        masked, labelled = self.model.objective == "masked", self.model.n_class > 0
        visible_mask = self._to_device(sample_masks(self.seed, filled, self.model.n_positions)) if masked else None
        labels = self._to_device(torch.from_numpy(self.images.labels_of(filled))) if labelled else None
        return MicroBatch(batch, tokens, visible_mask, labels)

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda":
            x = x.pin_memory()  # only from pinned memory do copies leave the host free
        return x.to(self.device, non_blocking=True)


def equal_micro_batch(batch_size: int, world_size: int, micro_batch: int) -> int:
    """Images per pass if all passes of a step are equally large and their number is the least.

    Fewer images than the number of passes are then padding: 128 images in passes of at most 50 are 3 of 43.
    """
    per_rank = math.ceil(batch_size / world_size)
    return math.ceil(per_rank / math.ceil(per_rank / micro_batch))


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
