"""The palette: k colours, and the exact map from any 24-bit colour to the nearest of them.

Colours are float32 RGB in [-1, 1], `x / 127.5 - 1` of the 8-bit value, as in OpenAI's `kmeans_centers.npy`. Nearest
is by squared Euclidean distance, the lowest index on a tie. Inputs are 8-bit, so the map is a table of 2^24 entries:
exact, and a single look-up per pixel.
"""

import functools
import hashlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt_ray import storage
from igpt_ray.errors import PaletteError

COLOURS = 1 << 24
CELL = 8
"""Side of the cubes of colours that `nearest_table` decides together."""


@dataclass(frozen=True, eq=False)
class Palette:
    """k colours, (k, 3) float32 in [-1, 1]."""

    colours: NDArray[np.float32]

    def __post_init__(self) -> None:
        c = self.colours
        if c.dtype != np.float32 or c.ndim != 2 or c.shape[1] != 3 or not 2 <= len(c) <= 65536:
            raise PaletteError(f"expected 2 to 65536 colours as (k, 3) float32, got {c.shape} {c.dtype}")
        if not np.isfinite(c).all() or np.abs(c).max() > 1.5:
            raise PaletteError("palette colours must be RGB scaled to [-1, 1]: x / 127.5 - 1")

    def __len__(self) -> int:
        return len(self.colours)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the colours as little-endian float32: the same however the file was written."""
        return hashlib.sha256(np.ascontiguousarray(self.colours, "<f4").tobytes()).hexdigest()

    @classmethod
    def fit(cls, histogram: NDArray[np.int64], k: int, seed: int = 0) -> "Palette":
        """k-means by faiss on distinct colours weighted by their counts.

        `histogram` has 2^24 counts, indexed by `pack`. Cost follows the number of distinct colours, not of pixels.
        """
        import faiss

        packed = np.flatnonzero(histogram)
        if len(packed) < k:
            raise PaletteError(f"the sample has {len(packed)} distinct colours, fewer than k = {k}: choose a smaller k")
        points = scale(unpack(packed))
        weights = histogram[packed].astype(np.float32)
        kmeans = faiss.Kmeans(3, k, niter=50, nredo=3, seed=seed, max_points_per_centroid=COLOURS)
        kmeans.train(points, weights=weights)
        centroids = np.asarray(kmeans.centroids, np.float32)
        return cls(centroids[np.lexsort(centroids.T[::-1])])

    @classmethod
    def load(cls, uri: str) -> "Palette":
        """Read a .npy of (k, 3) float32. Raises `PaletteError` for anything else; pickles are not opened."""
        data = storage.read(uri)
        try:
            colours = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # a damaged header raises anything: SyntaxError, TokenError, MemoryError, ...
            raise PaletteError(f"{uri} is not a palette: expected a .npy of (k, 3) float32 ({error})") from error
        return cls(colours)

    def save(self, uri: str) -> None:
        storage.write(uri, self.npy())

    def npy(self) -> bytes:
        """The palette as a .npy file."""
        return _npy(self.colours)

    def encode(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """(..., 3) uint8 -> (...) uint16, the nearest colour of each pixel."""
        if rgb.dtype != np.uint8 or rgb.shape[-1] != 3:
            raise PaletteError(f"expected (..., 3) uint8 pixels, got {rgb.shape} {rgb.dtype}")
        return self._table[pack(rgb)]

    def decode(self, tokens: NDArray[np.integer]) -> NDArray[np.uint8]:
        """(...) tokens -> (..., 3) uint8, `rint(127.5 * (c + 1))` as in OpenAI's sampler."""
        eight_bit = np.clip(np.rint(127.5 * (self.colours + 1)), 0, 255).astype(np.uint8)
        return eight_bit[tokens]

    @functools.cached_property
    def _table(self) -> NDArray[np.uint16]:
        """The 2^24 table, memory-mapped from the node's cache so that its processes share it."""
        path = storage.CACHE / f"table-{self.fingerprint[:24]}.npy"
        if not path.exists():
            storage.write(str(path), _npy(nearest_table(self.colours)))
        return np.load(path, mmap_mode="r")


def nearest_table(colours: NDArray[np.float32]) -> NDArray[np.uint16]:
    """(k, 3) -> (2^24,): the nearest colour of every 24-bit value, in float64, without searching all k for each.

    The cube of colours is cut into cells of `CELL` a side. Only a palette colour whose smallest distance to a cell is
    no larger than some other's largest distance can be nearest inside it: about three of 512. The squared distance is
    a sum over channels, so both bounds and distances are sums of three small tables.
    """
    levels = np.arange(256) / 127.5 - 1
    squared = (levels[:, None, None] - colours[None].astype(np.float64)) ** 2  # (256, k, 3)
    n = 256 // CELL
    by_cell = squared.reshape(n, CELL, len(colours), 3)
    nearest, farthest = by_cell.min(1), by_cell.max(1)  # (n, k, 3)
    table = np.empty((n, CELL, n, CELL, n, CELL), np.uint16)
    for r in range(n):
        for g in range(n):
            least = nearest[r, :, 0] + nearest[g, :, 1] + nearest[:, :, 2]  # (n, k): blue cells
            most = farthest[r, :, 0] + farthest[g, :, 1] + farthest[:, :, 2]
            possible = least <= most.min(1, keepdims=True)
            red_green = by_cell[r, :, None, :, 0] + by_cell[g, None, :, :, 1]  # (CELL, CELL, k)
            for b in range(n):
                candidates = np.flatnonzero(possible[b])
                distance = red_green[:, :, None, candidates] + by_cell[b][:, candidates, 2]
                table[r, :, g, :, b, :] = candidates[distance.argmin(-1)]
    return table.reshape(-1)


def nearest_float64(colours: NDArray[np.float32], rgb: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Brute force in float64, lowest index on a tie: what the table must equal. (M, 3) -> (M,)."""
    nearest = np.empty(len(rgb), np.int64)
    for start in range(0, len(rgb), 4096):
        block = rgb[start : start + 4096].astype(np.float64) / 127.5 - 1
        distance = ((block[:, None, :] - colours.astype(np.float64)[None]) ** 2).sum(-1)
        nearest[start : start + 4096] = distance.argmin(1)
    return nearest


def pack(rgb: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(..., 3) uint8 -> (...) uint32, 0xRRGGBB."""
    wide = rgb.astype(np.uint32)
    return np.asarray(wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2], np.uint32)


def unpack(packed: NDArray[np.integer]) -> NDArray[np.uint8]:
    """(...) -> (..., 3) uint8: the inverse of `pack`."""
    return np.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], axis=-1).astype(np.uint8)


def scale(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """8-bit to [-1, 1] (OpenAI's `src/utils.py: color_quantize_np`'s scale)."""
    return rgb.astype(np.float32) / np.float32(127.5) - np.float32(1)


def psnr(rgb: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.mean((rgb.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def _npy(array: NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()
