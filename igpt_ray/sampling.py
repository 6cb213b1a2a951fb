"""Sampling: given pixels -> finished pictures, a pixel at a time over a KV cache.

Every sample has a stream of uniform numbers of its own, a function of its seed and the position, turned into a colour
by inverting the cumulative distribution. So a sample does not depend on what it was batched with, or on where the
given part ends.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from igpt_ray import images
from igpt_ray.errors import SettingError
from igpt_ray.model import ImageGPT, KVCache
from igpt_ray.palette import Palette
from igpt_ray.shards import Tokens

TILE = 96
"""About how many pixels wide a picture is drawn in a figure."""


def seed_of(*words: int | str) -> int:
    """A seed that is a function of the words: below 2^64, and unlike that of any others."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def uniforms(seeds: list[int], n_positions: int) -> Tensor:
    """(len(seeds), n_positions) float64 in [0, 1): one Philox stream per seed, indexed by position."""
    streams = [np.random.Generator(np.random.Philox(key=seed)).random(n_positions) for seed in seeds]
    return torch.from_numpy(np.stack(streams))


@torch.inference_mode()
def complete(
    model: ImageGPT, given: Tensor, n: int, seeds: list[int], temperature: float = 1, top_k: int = 0
) -> Tensor:
    """Finish each picture n times: (B, S) given tokens -> (B * n, T), the samples of a picture side by side.

    `seeds` has one seed per sample (B * n). Raises `SettingError` if more is given than a picture has.
    """
    return torch.cat([given.repeat_interleave(n, 0), *steps(model, given, n, seeds, temperature, top_k)], dim=1)


@torch.inference_mode()
def steps(
    model: ImageGPT, given: Tensor, n: int, seeds: list[int], temperature: float = 1, top_k: int = 0
) -> Iterator[Tensor]:
    """The new pixels of `complete`, one position at a time: (B * n, 1) each."""
    B, S = given.shape
    T = model.config.n_positions
    if not model.causal:
        raise SettingError("a masked network has no next pixel: completions need one with the objective next")
    if S > T:
        raise SettingError(f"{S} pixels are given; a picture has {T}")
    if S == T:
        return
    u = uniforms(seeds, T).to(given.device)
    cache = KVCache(model, B)
    logits = model.prefill(given, cache).repeat_interleave(n, 0)  # (B * n, V)
    cache = cache.repeat(n)
    for t in range(S, T):
        token = pick(logits, u[:, t], temperature, top_k)  # (B * n,)
        yield token[:, None]
        if t + 1 < T:
            logits = model.step(token, cache)


def pick(logits: Tensor, u: Tensor, temperature: float = 1, top_k: int = 0) -> Tensor:
    """The colour whose share of the cumulative distribution contains u: (B, V), (B,) -> (B,).

    Temperature 0 takes the likeliest colour; top_k > 0 leaves the k likeliest (and any that tie with the last).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    cumulative = logits.softmax(-1).cumsum(-1)  # (B, V)
    target = u[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)


def figure(palette: Palette, originals: Tokens, completions: Tokens, rows: int) -> images.RGB:
    """One row a picture: the given part, its completions, the quantised original. (N, T), (N, n, T) -> (H, W, 3)."""
    n_px = int(originals.shape[1] ** 0.5)
    drawn = []
    for original, finished in zip(originals, completions, strict=True):
        whole = palette.decode(original).reshape(n_px, n_px, 3)
        given = whole.copy()
        given[rows:] = 128  # what is not given is grey
        drawn.append([given, *palette.decode(finished).reshape(-1, n_px, n_px, 3), whole])
    return images.sheet(drawn, scale=max(1, TILE // n_px), wide_gaps=(1, 1 + completions.shape[1]))
