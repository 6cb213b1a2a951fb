"""Likelihood: nats of images under a model, and under the count models that any network must beat.

Everything is a sum and a count until the last line. Bits per pixel are of the palette's image (k colours), so they
cannot be compared with bits per dimension of 256-level channels.
"""

import functools
import math
import operator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from igpt_ray.data.image_files import RGB
from igpt_ray.data.token_format import Tokens
from igpt_ray.evaluate.linear_probe import Judgement
from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT

Nats = NDArray[np.float64]


def image_nats(model: ImageGPT, tokens: Tokens, batch_size: int) -> Nats:
    """Nats of each image, summed over its positions: (N, T) -> (N,)."""
    return nats_both_ways(model, tokens, batch_size)[0]


@torch.inference_mode()
def nats_both_ways(model: ImageGPT, tokens: Tokens, batch_size: int) -> tuple[Nats, Nats]:
    """Nats of each image, summed over its positions, and of each position, summed over images: (N, T) -> (N,), (T,)."""
    device = model.wpe.device
    by_image, by_position = np.empty(len(tokens)), np.zeros(tokens.shape[1])
    for start in range(0, len(tokens), batch_size):
        x = torch.from_numpy(tokens[start : start + batch_size].astype(np.int64)).to(device)
        nats = losses.next_pixel(model(x), x).double()
        by_image[start : start + batch_size] = nats.sum(1).cpu().numpy()
        by_position += nats.sum(0).cpu().numpy()
    return by_image, by_position


@torch.inference_mode()
def pixel_nats(model: ImageGPT, tokens: Tokens, batch_size: int) -> Nats:
    """Nats of every pixel: (N, T) -> (N, T). An image's sum is that of `image_nats`."""
    nats = np.empty(tokens.shape)
    for start in range(0, len(tokens), batch_size):
        x = torch.from_numpy(tokens[start : start + batch_size].astype(np.int64)).to(model.wpe.device)
        nats[start : start + batch_size] = losses.next_pixel(model(x), x).double().cpu().numpy()
    return nats


@torch.inference_mode()
def masked_nats(model: ImageGPT, tokens: Tokens, keys: list[str], batch_size: int) -> Nats:
    """Nats per masked token of each image under a masked network, the mean over MASKS masks: (N, T) -> (N,)."""
    device = model.wpe.device
    nats = np.zeros(len(tokens))
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        x = torch.from_numpy(tokens[rows].astype(np.int64)).to(device)
        for mask in range(losses.MASKS):
            keep = losses.visible_masks_of_keys(keys[rows], mask, x.shape[1]).to(device)
            nats[rows] += losses.masked_pixel(model(x, keep), x, keep).double().cpu().numpy()
    return nats / losses.MASKS


@torch.inference_mode()
def class_logits(model: ImageGPT, tokens: Tokens, keys: list[str], batch_size: int) -> NDArray[np.float32]:
    """What the head of a fine-tuned network makes of images: (N, T) -> (N, K); under MASKS masks (N, MASKS, K)."""
    device = model.wpe.device
    found = []
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        x = torch.from_numpy(tokens[rows].astype(np.int64)).to(device)
        if model.causal:
            found.append(model.forward_with_classifier(x)[1])
            continue
        keeps = (losses.visible_masks_of_keys(keys[rows], mask, x.shape[1]) for mask in range(losses.MASKS))
        found.append(torch.stack([model.forward_with_classifier(x, keep.to(device))[1] for keep in keeps], dim=1))
    logits: NDArray[np.float32] = torch.cat(found).float().cpu().numpy()
    return logits


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


# ------------------------------------------------------------------------------------------------ where and whom

RANKED = 20
"""Images named at either end."""
HEAT = ((0, 0, 0), (150, 20, 60), (250, 140, 20), (255, 255, 220))
"""Colours of a heat map, from nothing to the most."""


@dataclass(frozen=True)
class Evaluation:
    """Likelihood of the images of a split or shard, and its classification if the model has a head."""

    keys: list[str]
    labels: NDArray[np.int64]
    nats: Nats
    """(N,) nats per image."""
    by_position: Nats
    """(T,) nats per position, summed over images."""
    classified: Judgement | None = None
    """Classification of the labelled images; None without a head."""

    @classmethod
    def joined(cls, parts: list["Evaluation"]) -> "Evaluation":
        classified = [part.classified for part in parts if part.classified is not None]
        return cls(
            [key for part in parts for key in part.keys],
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.nats for part in parts]),
            np.sum([part.by_position for part in parts], axis=0),
            functools.reduce(operator.add, classified) if classified else None,
        )

    def by_class(self, classes: list[str]) -> dict[str, dict[str, float]]:
        """The report of every class that has images."""
        T = len(self.by_position)
        return {
            name: Likelihood.of(self.nats[self.labels == c], T).report()
            for c, name in enumerate(classes)
            if (self.labels == c).any()
        }

    def ranking(self) -> dict[str, list[dict[str, object]]]:
        """The likeliest images and the least likely, with nats per token; the most extreme first."""
        order, T = np.argsort(self.nats, kind="stable"), len(self.by_position)
        ends = {"most_likely": order[:RANKED], "least_likely": order[::-1][:RANKED]}
        return {
            end: [{"key": self.keys[i], "nats_per_token": float(self.nats[i]) / T} for i in rows]
            for end, rows in ends.items()
        }


def auroc(inside: Nats, outside: Nats) -> float:
    """How likely an image from outside costs more nats than one from inside; equals count half."""
    ordered = np.sort(inside)
    below = np.searchsorted(ordered, outside, "left") + np.searchsorted(ordered, outside, "right")
    return float(below.mean() / 2 / len(inside))


def heat_map(values: Nats, n_px: int, scale: int) -> RGB:
    """A picture of one value a position, from zero to the largest: (T,) -> (n_px * scale, n_px * scale, 3)."""
    share = (values / values.max()).reshape(n_px, n_px).repeat(scale, 0).repeat(scale, 1)
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(share, stops, channel) for channel in zip(*HEAT, strict=True)], -1).astype(np.uint8)


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
    joint_counts = _counts(fit_context << 17 | fit_token, context << 17 | token)
    total = _counts(fit_context, context)
    candidates = ((joint_counts + s * backoff) / (total + s) for s in STRENGTHS)
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
