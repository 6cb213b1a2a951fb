"""What fine-tuning changes of its images: a mirror and a shifted crop, of tokens, as exact as of pixels.

The paper takes them from Wide Residual Networks, for CIFAR-10 and -100 alone (section 3.1): 4 reflected pixels on each
side, then a crop of the image's own size, of it or its mirror. Every pixel is quantised by itself, so the tokens of a
changed picture are the changed tokens of the picture. On ImageNet its random crops are made before the picture is
shrunk, which no token can tell any more: there several views of every image are prepared instead.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from igpt_ray.data.loader import Batch
from igpt_ray.data.token_store import Tokens
from igpt_ray.rng import seed_of, uniforms


@dataclass(frozen=True)
class Augment:
    n_px: int
    pad: int
    """Below n_px: a reflection reaches no further."""
    flip: bool

    def __call__(self, tokens: Tokens, seed: int, batch: Batch) -> Tokens:
        """(N, T) -> (N, T), a function of (seed, epoch, row) of each image, whoever its neighbours are."""
        rows = zip(batch.epochs.tolist(), batch.rows.tolist(), strict=True)
        u = uniforms([seed_of("augment", seed, epoch, row) for epoch, row in rows], 3).numpy()
        down, right = (u[:, :2].T * (2 * self.pad + 1)).astype(np.int64) - self.pad
        return moved(tokens, self.n_px, down, right, self.flip & (u[:, 2] < 0.5))


def moved(
    tokens: Tokens, n_px: int, down: NDArray[np.int64], right: NDArray[np.int64], mirrored: NDArray[np.bool_]
) -> Tokens:
    """Each picture reflected beyond its edges, mirrored or not, and seen through a window `down` and `right` of it."""
    at = np.arange(n_px)
    rows, columns = (_reflected(at + by[:, None], n_px) for by in (down, right))  # (N, n_px)
    columns = np.where(mirrored[:, None], n_px - 1 - columns, columns)
    grid = tokens.reshape(-1, n_px, n_px)
    return grid[np.arange(len(grid))[:, None, None], rows[:, :, None], columns[:, None, :]].reshape(tokens.shape)


def _reflected(at: NDArray[np.int64], n_px: int) -> NDArray[np.int64]:
    """Pixel -1 is pixel 1, pixel n_px is pixel n_px - 2: the edge itself is not doubled."""
    return n_px - 1 - np.abs(n_px - 1 - np.abs(at))
