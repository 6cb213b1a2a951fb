"""Random numbers as functions of names: seeds derived from words, and one uniform stream a seed."""

import hashlib

import numpy as np
import torch
from torch import Tensor


def seed_of(*words: int | str) -> int:
    """A seed in [0, 2^64) derived from the words by SHA-256, so that different words give independent streams."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def uniforms(seeds: list[int], n_positions: int) -> Tensor:
    """(len(seeds), n_positions) float64 in [0, 1): one Philox stream per seed, indexed by position."""
    streams = [np.random.Generator(np.random.Philox(key=seed)).random(n_positions) for seed in seeds]
    return torch.from_numpy(np.stack(streams))
