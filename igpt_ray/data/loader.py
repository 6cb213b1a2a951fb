"""The rows of a global batch as a function of (seed, step), independent of the number of workers and of resumes.

Position p = step * batch_size + i counts images since the start. Epoch e = p // n_rows reads the rows in the order of a
permutation that is a function of (seed, e). It is computed index by index and needs no memory for the rows. Tokens come
from a memory map that each node fills once from verified shards, and verifies again when it opens the map.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from igpt_ray import storage
from igpt_ray.data import node_cache
from igpt_ray.data.token_format import Tokens
from igpt_ray.data.token_store import TokenStore, tokens_of
from igpt_ray.errors import TokenStoreError

Rows = NDArray[np.int64]
ROUNDS = 6


class Batch(NamedTuple):
    """The images of a global batch, in order."""

    epochs: Rows
    rows: Rows


def global_batch(seed: int, step: int, batch_size: int, n_rows: int) -> Batch:
    """The images of one step. A batch may span two epochs; every epoch contains every image."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n_rows
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        selected = epochs == epoch
        rows[selected] = permute(positions[selected] % n_rows, n_rows, seed, int(epoch))
    return Batch(epochs, rows)


def share(batch: Batch, rank: int, world_size: int) -> Batch:
    """The contiguous part of one worker. The sizes of the parts differ by at most one image."""
    n = len(batch.rows)
    part = slice(rank * n // world_size, (rank + 1) * n // world_size)
    return Batch(batch.epochs[part], batch.rows[part])


def keys_of(store: TokenStore, split: str, rows: Rows) -> list[str]:
    """The keys of images, read from their shards. This is slow and meant for error messages."""
    keys: dict[int, str] = {}
    start = 0
    for shard in store.manifest.select(split):
        in_shard = [int(row) for row in rows if start <= row < start + shard.rows]
        if in_shard:
            names = store.read(shard)["key"]
            keys |= {row: names[row - start].as_py() for row in in_shard}
        start += shard.rows
    return [keys[int(row)] for row in rows]


def permute(index: Rows, n: int, seed: int, epoch: int) -> Rows:
    """A bijection of 0 .. n-1 keyed by (seed, epoch), applied to `index`.

    A Feistel network permutes the numbers below the next power of four. It is applied again to results >= n until they
    are below n ("cycle walking"), which gives a bijection of 0 .. n-1.
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    digest = hashlib.sha256(f"{seed}\0{epoch}".encode()).digest()
    keys = [np.uint64(int.from_bytes(digest[4 * r : 4 * r + 4], "little")) for r in range(ROUNDS)]
    x = index.astype(np.uint64)
    outside = np.ones(len(x), bool)
    while outside.any():
        x[outside] = _feistel(x[outside], bits, keys)
        outside = x >= n
    return x.astype(np.int64)


def _feistel(x: NDArray[np.uint64], bits: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    mask = np.uint64((1 << bits) - 1)
    left, right = x >> np.uint64(bits), x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ (key << np.uint64(32))) & mask)
    return left << np.uint64(bits) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit affects every output bit. Overflow is intended."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SplitCache:
    """A split's tokens on a node: one (rows, positions) uint16 memory map per view; its labels if `labelled`."""

    def __init__(self, store: TokenStore, split: str, folder: Path | None = None, labelled: bool = False):
        self.views = [_map(store, split, v, folder or storage.CACHE) for v in range(store.manifest.views(split))]
        self.labels = _labels(store, split, folder or storage.CACHE) if labelled else None

    def __len__(self) -> int:
        return len(self.views[0])

    def __getitem__(self, batch: Batch) -> Tokens:
        """(len(batch), positions): epoch e reads view e mod the number of views."""
        tokens = np.empty((len(batch.rows), self.views[0].shape[1]), np.uint16)
        for v, view in enumerate(self.views):
            selected = batch.epochs % len(self.views) == v
            tokens[selected] = view[batch.rows[selected]]
        return tokens

    def labels_of(self, batch: Batch) -> Rows:
        """(len(batch),) int64. All views of an image have the same label."""
        assert self.labels is not None, "the split was opened without its labels"
        return self.labels[batch.rows].astype(np.int64)


def _map(store: TokenStore, split: str, view: int, folder: Path) -> Tokens:
    """Fill the cache with verified shards."""
    shape = (store.manifest.rows(split), store.kind.n_positions)
    path = folder / f"tokens-{store.sha256[:24]}-{split}-v{view}.u16"
    return node_cache.mapped(
        path, shape, lambda: (tokens_of(store.read(s)) for s in store.manifest.select(split, view))
    )


def _labels(store: TokenStore, split: str, folder: Path) -> NDArray[np.uint16]:
    """The labels from the cache, like `_map`. Raises `TokenStoreError` if an image has none."""
    path = folder / f"tokens-{store.sha256[:24]}-{split}-labels.u16"
    tables = (store.read(shard) for shard in store.manifest.select(split))
    return node_cache.mapped(path, (store.manifest.rows(split),), lambda: (labels_in(table, split) for table in tables))


def labels_in(table: pa.Table, split: str) -> NDArray[np.uint16]:
    """The labels of a shard. Raises `TokenStoreError` if an image has none."""
    labels = table["label"].to_numpy()
    if missing := int((labels < 0).sum()):
        raise TokenStoreError(
            f"{missing} images of {split} have no label: classification needs a split whose images all have one"
        )
    return labels.astype(np.uint16)
