"""Likelihood: nats of images under a model, and under the count models that any network must beat.

Everything is a sum and a count until the last line. Bits per pixel are of the palette's image (k colours), so they
cannot be compared with bits per dimension of 256-level channels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from igpt_ray import objectives
from igpt_ray.model import ImageGPT
from igpt_ray.shards import Tokens

Nats = NDArray[np.float64]


@torch.inference_mode()
def image_nats(model: ImageGPT, tokens: Tokens, batch_size: int) -> Nats:
    """Nats of each image, summed over its positions: (N, T) -> (N,)."""
    device = model.wpe.device
    nats = np.empty(len(tokens))
    for start in range(0, len(tokens), batch_size):
        x = torch.from_numpy(tokens[start : start + batch_size].astype(np.int64)).to(device)
        nats[start : start + batch_size] = objectives.next_pixel(model(x), x).double().sum(1).cpu().numpy()
    return nats


@torch.inference_mode()
def masked_nats(model: ImageGPT, tokens: Tokens, keys: list[str], batch_size: int) -> Nats:
    """Nats per masked token of each image under a masked network, the mean over MASKS masks: (N, T) -> (N,)."""
    device = model.wpe.device
    nats = np.zeros(len(tokens))
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        x = torch.from_numpy(tokens[rows].astype(np.int64)).to(device)
        for mask in range(objectives.MASKS):
            keep = objectives.keep_of_keys(keys[rows], mask, x.shape[1]).to(device)
            nats[rows] += objectives.masked_pixel(model(x, keep), x, keep).double().cpu().numpy()
    return nats / objectives.MASKS


@dataclass(frozen=True)
class Likelihood:
    """Sums over images."""

    nats_sum: float
    nats_squared_sum: float
    """Of each image's nats, for the standard error."""
    images: int
    n_positions: int

    @classmethod
    def of(cls, nats: Nats, n_positions: int) -> "Likelihood":
        return cls(float(nats.sum()), float((nats**2).sum()), len(nats), n_positions)

    def __add__(self, other: "Likelihood") -> "Likelihood":
        assert self.n_positions == other.n_positions, "likelihoods of pictures of different sizes"
        return Likelihood(
            self.nats_sum + other.nats_sum,
            self.nats_squared_sum + other.nats_squared_sum,
            self.images + other.images,
            self.n_positions,
        )

    def report(self) -> dict[str, float]:
        """Nats per token with its standard error over images, bits per pixel, images, tokens."""
        mean = self.nats_sum / self.images
        variance = max(0.0, self.nats_squared_sum / self.images - mean**2)
        return {
            "nats_per_token": mean / self.n_positions,
            "standard_error": math.sqrt(variance / self.images) / self.n_positions,
            "bits_per_pixel": mean / self.n_positions / math.log(2),
            "images": self.images,
            "tokens": self.images * self.n_positions,
        }


# ------------------------------------------------------------------------------------------------ count models

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def count_models(fit: Tokens, test: Tokens, n_px: int, n_vocab: int) -> dict[str, float]:
    """Nats per token of models that only count, fitted on (N, T) tokens and tried on others.

    `unigram_by_position`: how often each colour stands at each position. `bigram_previous_pixel`: given the pixel
    before. `context_2d`: given the pixels to the left and above, backed off to the bigram. Each is smoothed towards
    the next simpler one; the strength is the best for `test`, which favours these models.
    """
    V = n_vocab
    one = np.ones(test.size) / V
    x, y = fit.astype(np.int64), test.astype(np.int64)
    position = _mixture(*_columns(_positions(x), x), *_columns(_positions(y), y), one)
    unigram = _mixture(*_columns(np.zeros_like(x), x), *_columns(np.zeros_like(y), y), one)
    bigram = _mixture(*_columns(_previous(x, V), x), *_columns(_previous(y, V), y), unigram)
    context = _mixture(*_columns(_left_and_above(x, n_px, V), x), *_columns(_left_and_above(y, n_px, V), y), bigram)
    return {
        "unigram_by_position": float(-np.log(position).mean()),
        "bigram_previous_pixel": float(-np.log(bigram).mean()),
        "context_2d": float(-np.log(context).mean()),
    }


def _mixture(
    fit_context: NDArray[np.int64],
    fit_token: NDArray[np.int64],
    context: NDArray[np.int64],
    token: NDArray[np.int64],
    backoff: NDArray[np.float64],
) -> NDArray[np.float64]:
    """p(token | context) = (count(context, token) + s * backoff) / (count(context) + s) at the best strength s."""
    joint = _counts(fit_context << 17 | fit_token, context << 17 | token)
    total = _counts(fit_context, context)
    candidates = ((joint + s * backoff) / (total + s) for s in STRENGTHS)
    return max(candidates, key=lambda p: float(np.log(p).sum()))


def _counts(seen: NDArray[np.int64], asked: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each of `asked` was seen; memory follows the number of distinct codes, not their range."""
    codes, counts = np.unique(seen, return_counts=True)
    at = np.searchsorted(codes, asked).clip(max=len(codes) - 1)
    return np.where(codes[at] == asked, counts[at], 0)


def _columns(context: NDArray[np.int64], tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return context.ravel(), tokens.ravel()


def _positions(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


def _previous(tokens: NDArray[np.int64], V: int) -> NDArray[np.int64]:
    """The pixel before in raster order; V stands for "none"."""
    return np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=V)


def _left_and_above(tokens: NDArray[np.int64], n_px: int, V: int) -> NDArray[np.int64]:
    grid = np.pad(tokens.reshape(-1, n_px, n_px), ((0, 0), (1, 0), (1, 0)), constant_values=V)
    return (grid[:, 1:, :-1] * (V + 1) + grid[:, :-1, 1:]).reshape(tokens.shape)
