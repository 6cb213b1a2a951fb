"""Augmentation for fine-tuning: horizontal flips and shifted crops, applied to tokens.

The paper takes these from Wide Residual Networks, for CIFAR-10 and -100 only (section 3.1): reflection padding of 4
pixels on each side, a random crop of the original size, and a random flip. Pixels are quantised independently, so
augmenting the tokens equals tokenizing the augmented image. On ImageNet the paper crops before it resizes, which cannot
be done on tokens: there, several views of every image are prepared instead.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from igpt_ray.data.loader import Batch
from igpt_ray.data.token_format import Tokens
from igpt_ray.rng import seed_of, uniforms


@dataclass(frozen=True)
class Augment:
    n_px: int
    pad: int
    """Must be less than n_px, the limit of reflection padding."""
    flip: bool

    def __call__(self, tokens: Tokens, seed: int, batch: Batch) -> Tokens:
        """(N, T) -> (N, T). An image's augmentation depends on (seed, epoch, row), not on the rest of the batch."""
        rows = zip(batch.epochs.tolist(), batch.rows.tolist(), strict=True)
        u = uniforms([seed_of("augment", seed, epoch, row) for epoch, row in rows], 3).numpy()
        down, right = (u[:, :2].T * (2 * self.pad + 1)).astype(np.int64) - self.pad
        return shifted(tokens, self.n_px, down, right, self.flip & (u[:, 2] < 0.5))


def shifted(
    tokens: Tokens, n_px: int, down: NDArray[np.int64], right: NDArray[np.int64], mirrored: NDArray[np.bool_]
) -> Tokens:
    """Each image with reflection padding, optionally flipped, cropped at an offset of `down` and `right` pixels."""
    positions = np.arange(n_px)
    rows, columns = (_reflected(positions + offset[:, None], n_px) for offset in (down, right))  # (N, n_px)
    columns = np.where(mirrored[:, None], n_px - 1 - columns, columns)
    grid = tokens.reshape(-1, n_px, n_px)
    return grid[np.arange(len(grid))[:, None, None], rows[:, :, None], columns[:, None, :]].reshape(tokens.shape)


def _reflected(positions: NDArray[np.int64], n_px: int) -> NDArray[np.int64]:
    """Reflect positions outside 0 .. n_px-1 without repeating the edge: -1 becomes 1, n_px becomes n_px - 2."""
    return n_px - 1 - np.abs(n_px - 1 - np.abs(positions))
