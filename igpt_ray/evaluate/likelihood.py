"""Likelihood: nats of images under a model, and under count models as baselines.

Results are sums and counts, so parts of a split can be added. Bits per pixel are of the image in palette colours (k
values), so they cannot be compared with bits per dimension of 256-level channels.
"""

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from igpt_ray.data.image_files import RGB
from igpt_ray.data.token_format import Tokens
from igpt_ray.evaluate.features import batches
from igpt_ray.evaluate.linear_probe import ClassificationSums
from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT

Nats = NDArray[np.float64]
Codes = NDArray[np.int64]


def image_nats(model: ImageGPT, tokens: Tokens, batch_size: int) -> Nats:
    """Nats of each image, summed over its positions: (N, T) -> (N,)."""
    return nats_by_image_and_position(model, tokens, batch_size)[0]


@torch.inference_mode()
def nats_by_image_and_position(model: ImageGPT, tokens: Tokens, batch_size: int) -> tuple[Nats, Nats]:
    """Nats of each image, summed over its positions, and of each position, summed over images: (N, T) -> (N,), (T,)."""
    by_image, by_position = np.empty(len(tokens)), np.zeros(tokens.shape[1])
    for rows, x, _ in batches(model, tokens, [], batch_size):
        nats = losses.next_pixel(model(x), x).double()
        by_image[rows] = nats.sum(1).cpu().numpy()
        by_position += nats.sum(0).cpu().numpy()
    return by_image, by_position


@torch.inference_mode()
def pixel_nats(model: ImageGPT, tokens: Tokens, batch_size: int) -> Nats:
    """Nats of every pixel: (N, T) -> (N, T). The sum over an image equals `image_nats`."""
    nats = np.empty(tokens.shape)
    for rows, x, _ in batches(model, tokens, [], batch_size):
        nats[rows] = losses.next_pixel(model(x), x).cpu().numpy()
    return nats


@torch.inference_mode()
def masked_nats(model: ImageGPT, tokens: Tokens, keys: list[str], batch_size: int) -> Nats:
    """Nats per masked token of each image under a masked network, the mean over MASKS masks: (N, T) -> (N,)."""
    nats = np.zeros(len(tokens))
    for rows, x, masks in batches(model, tokens, keys, batch_size):
        for visible in masks:
            assert visible is not None
            nats[rows] += losses.masked_pixel(model(x, visible), x, visible).double().cpu().numpy()
    return nats / losses.MASKS


@torch.inference_mode()
def class_logits(model: ImageGPT, tokens: Tokens, keys: list[str], batch_size: int) -> NDArray[np.float32]:
    """Class logits of a fine-tuned network: (N, T) -> (N, K); of a masked network (N, MASKS, K)."""
    parts = []
    for _, x, masks in batches(model, tokens, keys, batch_size):
        by_mask = [model.forward_with_classifier(x, mask)[1] for mask in masks]
        parts.append(by_mask[0] if model.causal else torch.stack(by_mask, dim=1))
    logits: NDArray[np.float32] = torch.cat(parts).float().cpu().numpy()
    return logits


@dataclass(frozen=True)
class Likelihood:
    """Sums over images."""

    nats_sum: float
    nats_squared_sum: float
    """Sum of the squared nats of each image, for the standard error."""
    images: int
    n_positions: int

    @classmethod
    def of(cls, nats: Nats, n_positions: int) -> "Likelihood":
        return cls(float(nats.sum()), float((nats**2).sum()), len(nats), n_positions)

    def __add__(self, other: "Likelihood") -> "Likelihood":
        assert self.n_positions == other.n_positions, "likelihoods of images of different sizes"
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


# ------------------------------------------------------------------------------------------------ by position and class

RANKED = 20
"""Images listed at either end of the ranking."""
HEAT_COLOURS = ((0, 0, 0), (150, 20, 60), (250, 140, 20), (255, 255, 220))
"""Colours of a heat map, from zero to the maximum, evenly spaced."""


@dataclass(frozen=True)
class Evaluation:
    """Likelihood of the images of a split or shard, and its classification if the model has a head."""

    keys: list[str]
    labels: NDArray[np.int64]
    nats: Nats
    """(N,) nats per image."""
    by_position: Nats
    """(T,) nats per position, summed over images."""
    classification: ClassificationSums | None = None
    """Of the labelled images; None without a head."""

    @classmethod
    def concatenate(cls, parts: list["Evaluation"]) -> "Evaluation":
        sums = [part.classification for part in parts if part.classification is not None]
        return cls(
            [key for part in parts for key in part.keys],
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.nats for part in parts]),
            np.sum([part.by_position for part in parts], axis=0),
            functools.reduce(operator.add, sums) if sums else None,
        )

    def by_class(self, classes: list[str]) -> dict[str, dict[str, float]]:
        """Class name -> likelihood report, for classes that have images."""
        T = len(self.by_position)
        return {
            name: Likelihood.of(self.nats[self.labels == c], T).report()
            for c, name in enumerate(classes)
            if (self.labels == c).any()
        }

    def ranking(self) -> dict[str, list[dict[str, object]]]:
        """The most likely and the least likely images with nats per token, the most extreme first."""
        order, T = np.argsort(self.nats, kind="stable"), len(self.by_position)
        ends = {"most_likely": order[:RANKED], "least_likely": order[::-1][:RANKED]}
        return {
            end: [{"key": self.keys[i], "nats_per_token": float(self.nats[i]) / T} for i in rows]
            for end, rows in ends.items()
        }


def auroc(inside: Nats, outside: Nats) -> float:
    """Probability that an image of `outside` has more nats than one of `inside`; ties count half."""
    ordered = np.sort(inside)
    below = np.searchsorted(ordered, outside, "left") + np.searchsorted(ordered, outside, "right")
    return float(below.mean() / 2 / len(inside))


def heat_map(values: Nats, n_px: int, scale: int) -> RGB:
    """A picture of one value per position, from zero to the maximum: (T,) -> (n_px * scale, n_px * scale, 3)."""
    fraction = (values / values.max()).reshape(n_px, n_px).repeat(scale, 0).repeat(scale, 1)
    stops = np.linspace(0, 1, len(HEAT_COLOURS))
    channels = [np.interp(fraction, stops, channel) for channel in zip(*HEAT_COLOURS, strict=True)]
    return np.stack(channels, -1).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ count models

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def count_models(fit: Tokens, test: Tokens, n_px: int, n_vocab: int) -> dict[str, float]:
    """Nats per token on `test` of count models fitted on `fit`, both (N, T).

    `unigram_by_position`: frequency of each colour at each position. `bigram_previous_pixel`: given the previous pixel.
    `context_2d`: given the pixels to the left and above. Each backs off to the next simpler model. The smoothing
    strength is the best on `test`, which favours these baselines.
    """
    x, y = fit.astype(np.int64), test.astype(np.int64)

    def mixture(context: Callable[[Codes], Codes], backoff: NDArray[np.float64]) -> NDArray[np.float64]:
        """p(token | context) = (count(context, token) + s * backoff) / (count(context) + s) at the best s."""
        given_fit, given = context(x), context(y)
        joint, total = _counts(given_fit << 17 | x, given << 17 | y), _counts(given_fit, given)
        candidates = ((joint + s * backoff) / (total + s) for s in STRENGTHS)
        return max(candidates, key=lambda p: float(np.log(p).sum()))

    uniform = np.full(test.shape, 1 / n_vocab)
    bigram = mixture(lambda z: _previous(z, n_vocab), mixture(np.zeros_like, uniform))
    return {
        "unigram_by_position": _mean_nats(mixture(lambda z: np.broadcast_to(np.arange(z.shape[1]), z.shape), uniform)),
        "bigram_previous_pixel": _mean_nats(bigram),
        "context_2d": _mean_nats(mixture(lambda z: _left_and_above(z, n_px, n_vocab), bigram)),
    }


def _counts(fit: Codes, codes: Codes) -> Codes:
    """The frequency in `fit` of each of `codes`; memory grows with the number of distinct codes, not their range."""
    distinct, counts = np.unique(fit, return_counts=True)
    indices = np.searchsorted(distinct, codes).clip(max=len(distinct) - 1)
    return np.where(distinct[indices] == codes, counts[indices], 0)


def _previous(tokens: Codes, V: int) -> Codes:
    """The previous pixel in raster order; V for none."""
    return np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=V)


def _left_and_above(tokens: Codes, n_px: int, V: int) -> Codes:
    grid = np.pad(tokens.reshape(-1, n_px, n_px), ((0, 0), (1, 0), (1, 0)), constant_values=V)
    return (grid[:, 1:, :-1] * (V + 1) + grid[:, :-1, 1:]).reshape(tokens.shape)


def _mean_nats(p: NDArray[np.float64]) -> float:
    return float(-np.log(p).mean())
