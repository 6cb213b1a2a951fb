"""The palette: k colours, and the exact map from every 24-bit colour to the nearest of them.

Colours are float32 RGB in [-1, 1], `x / 127.5 - 1` of the 8-bit value, as in OpenAI's `kmeans_centers.npy`. The
nearest colour has the smallest squared Euclidean distance; ties take the lowest index. Inputs are 8-bit, so the map is
a table of 2^24 entries: exact, with one lookup per pixel.

`openai_palette.npy` in this folder holds OpenAI's own 512 colours, published with Image GPT under the Modified MIT
licence in `openai_palette.LICENSE`; `Palette.load("openai")` reads them.
"""

import functools
import hashlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from igpt_ray import storage
from igpt_ray.data import kmeans, node_cache
from igpt_ray.data import pixels as images
from igpt_ray.data.config import OPENAI_PALETTE
from igpt_ray.errors import PaletteError

COLOURS = 1 << 24
BLOCK, CELL = 32, 8
"""Sides of the colour cubes for which `nearest_table` prunes candidates (block), then computes distances (cell)."""
CHUNK = 1 << 15
"""Pixels per lookup in `encode`, so that their indices fit the processor's cache."""


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
        """sha256 of the colours as little-endian float32, independent of the file's encoding."""
        return hashlib.sha256(np.ascontiguousarray(self.colours, "<f4").tobytes()).hexdigest()

    @classmethod
    def fit(cls, histogram: NDArray[np.int64], k: int, seed: int = 0, gpu: bool = False) -> "Palette":
        """k-means on distinct colours weighted by their counts, sorted by red, green, blue.

        `histogram` has 2^24 counts, indexed by `pack`. Time and memory depend on the number of distinct colours, not of
        pixels: 1.7 GB for all 2^24 colours.
        Equal arguments give equal palettes on one machine type and faiss version, with any number of threads. Another
        processor or a GPU may round differently and give another palette of similar quality.
        """
        packed = np.flatnonzero(histogram)
        if len(packed) < k:
            raise PaletteError(f"the sample has {len(packed)} distinct colours, fewer than k = {k}: choose a smaller k")
        points = kmeans.Points(scale(unpack(packed)), histogram[packed].astype(np.float64))
        centres = kmeans.fit(points, k, seed, gpu)
        return cls(centres[np.lexsort(centres.T[::-1])])

    @classmethod
    def load(cls, uri: str) -> "Palette":
        """Read a .npy file of (k, 3) float32. `openai` is OpenAI's palette, part of this package.

        Raises `PaletteError` for any other content. Pickles are not opened.
        """
        if uri == OPENAI_PALETTE:
            data = resources.files("igpt_ray.data").joinpath("openai_palette.npy").read_bytes()
        else:
            data = storage.read(uri)
        try:
            colours = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # damaged headers raise many types: SyntaxError, TokenError, MemoryError, ...
            raise PaletteError(f"{uri} is not a palette: expected a .npy of (k, 3) float32 ({error})") from error
        try:
            return cls(colours)
        except PaletteError as error:
            raise PaletteError(f"{uri}: {error}") from error

    def save(self, uri: str) -> None:
        storage.write(uri, self.npy())

    def npy(self) -> bytes:
        """The palette as a .npy file."""
        out = io.BytesIO()
        np.save(out, self.colours)
        return out.getvalue()

    def encode(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """(..., 3) uint8 -> (...) uint16: the index of the nearest colour of each pixel."""
        if rgb.dtype != np.uint8 or rgb.shape[-1] != 3:
            raise PaletteError(f"expected (..., 3) uint8 pixels, got {rgb.shape} {rgb.dtype}")
        pixels = np.ascontiguousarray(rgb).reshape(-1, 3)
        tokens = np.empty(len(pixels), np.uint16)
        _look_up(self._table, pixels, tokens)
        return tokens.reshape(rgb.shape[:-1])

    def decode(self, tokens: NDArray[np.integer]) -> NDArray[np.uint8]:
        """(...) tokens -> (..., 3) uint8, `rint(127.5 * (c + 1))` as in OpenAI's sampler."""
        eight_bit = np.clip(np.rint(127.5 * (self.colours + 1)), 0, 255).astype(np.uint8)
        return eight_bit[tokens]

    @functools.cached_property
    def _table(self) -> NDArray[np.uint16]:
        """The table of 2^24 entries, memory-mapped from the node's cache and shared by its processes.

        It is indexed by 0xBBGGRR, a pixel's bytes read as a little-endian number.
        """
        path = storage.CACHE / f"table-{self.fingerprint[:24]}-bgr.u16"

        def table() -> Iterator[NDArray[np.uint16]]:
            bgr = nearest_table(self.colours).reshape(256, 256, 256).T
            yield np.ascontiguousarray(bgr).reshape(-1)

        return node_cache.mapped(path, (COLOURS,), table)


def _look_up(table: NDArray[np.uint16], pixels: NDArray[np.uint8], tokens: NDArray[np.uint16]) -> None:
    """Fill `tokens` (n,) from `pixels` (n, 3).

    A pixel and the byte after it are read as one 32-bit number, and that byte is masked, so packing takes one pass
    instead of five. The last pixel has no byte after it and is handled separately.
    """
    if not len(pixels):
        return
    four_bytes = np.ndarray((len(pixels) - 1,), "<u4", pixels, strides=(3,))
    indices = np.empty(CHUNK, np.intp)  # the index type of `take`, which would convert any other
    for start in range(0, len(four_bytes), CHUNK):
        chunk = four_bytes[start : start + CHUNK]
        index = np.bitwise_and(chunk, COLOURS - 1, out=indices[: len(chunk)], casting="unsafe")
        # The default mode would buffer `out`, to keep it unchanged if an index were out of range.
        np.take(table, index, out=tokens[start : start + len(chunk)], mode="clip")
    red, green, blue = (int(channel) for channel in pixels[-1])
    tokens[-1] = table[blue << 16 | green << 8 | red]


def nearest_table(colours: NDArray[np.float32]) -> NDArray[np.uint16]:
    """(k, 3) -> (2^24,): the nearest colour of every 24-bit value, in float64, without a search over all k for each.

    The colour cube is divided into blocks, and each block into cells. A palette colour can be nearest inside a cell
    only if its smallest distance to the cell is at most the largest distance of every other colour: about 3 of 512
    remain. The same bound on blocks reduces the candidates of their cells. The squared distance is a sum over
    channels, so bounds and distances are sums of three small tables. Rounding is monotonic, so the bounds also hold
    for rounded sums.
    """
    table = np.empty((256, 256, 256), np.uint16)
    blocks = [slice(start, start + BLOCK) for start in range(0, 256, BLOCK)]
    bounds = [[_bounds(_squared(levels, colours[:, c])) for levels in blocks] for c in range(3)]
    for red, green, blue in itertools.product(range(len(blocks)), repeat=3):
        (r_least, r_most), (g_least, g_most), (b_least, b_most) = bounds[0][red], bounds[1][green], bounds[2][blue]
        candidates = np.flatnonzero(r_least + g_least + b_least <= (r_most + g_most + b_most).min())
        block = (blocks[red], blocks[green], blocks[blue])
        squared = [_squared(levels, colours[candidates, c]) for c, levels in enumerate(block)]
        _decide_block(table[block], candidates, *squared)
    return table.reshape(-1)


def _squared(levels: slice, channel: NDArray[np.float32]) -> NDArray[np.float64]:
    """Squared distance of 8-bit levels to one channel of k colours, (levels, k)."""
    return (np.arange(256)[levels, None] / 127.5 - 1 - channel.astype(np.float64)) ** 2


def _bounds(squared: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Minimum and maximum over the second to last axis."""
    return squared.min(-2), squared.max(-2)


def _decide_block(
    block: NDArray[np.uint16],
    candidates: NDArray[np.intp],
    red: NDArray[np.float64],
    green: NDArray[np.float64],
    blue: NDArray[np.float64],
) -> None:
    """Fill one block of the table, cell by cell, with the nearest of the `candidates` colours."""
    n = BLOCK // CELL
    red, green, blue = (squared.reshape(n, CELL, -1) for squared in (red, green, blue))
    (r_least, r_most), (g_least, g_most), (b_least, b_most) = _bounds(red), _bounds(green), _bounds(blue)
    cells = block.reshape(n, CELL, n, CELL, n, CELL)
    for r, g in np.ndindex(n, n):
        least = r_least[r] + g_least[g] + b_least  # (n, candidates): cells of blue
        most = r_most[r] + g_most[g] + b_most
        for b, near in enumerate(least <= most.min(1, keepdims=True)):
            c = np.flatnonzero(near)
            red_green = red[r][:, None, c] + green[g][None, :, c]  # (CELL, CELL, c)
            distance = red_green[:, :, None] + blue[b][:, c]
            cells[r, :, g, :, b] = candidates[c[distance.argmin(-1)]]


def quality(
    palette: Palette, histogram: NDArray[np.int64], held_out: NDArray[np.int64] | None = None
) -> dict[str, float | int | None]:
    """Quality of a palette on pixels given as a colour histogram, usually the one that it was fitted to.

    `mse` is the mean squared distance to the decoded colour in 8-bit units, summed over the channels; `held_out_mse` is
    the same for the histogram `held_out`. PSNR is in dB, entropy of the tokens in nats, at most log(k).
    """
    packed = np.flatnonzero(histogram)
    counts = histogram[packed]
    share = np.bincount(palette.encode(unpack(packed)), weights=counts, minlength=len(palette)) / counts.sum()
    used = share[share > 0]
    mse = _mse(palette, histogram)
    return {
        "pixels": int(counts.sum()),
        "distinct_colours": len(packed),
        "mse": round(mse, 2),
        **({} if held_out is None else {"held_out_mse": round(_mse(palette, held_out), 2)}),
        "psnr_db": round(float(10 * np.log10(3 * 255**2 / mse)), 2) if mse else None,
        "entropy_nats": round(float(-(used * np.log(used)).sum()), 4),
        "colours_used": len(used),
    }


def _mse(palette: Palette, histogram: NDArray[np.int64]) -> float:
    packed = np.flatnonzero(histogram)
    rgb = unpack(packed)
    squared = ((rgb.astype(np.int64) - palette.decode(palette.encode(rgb))) ** 2).sum(1)
    return float((squared * histogram[packed]).sum() / histogram[packed].sum())


def sidecar(palette: str, ending: str = ".json") -> str:
    """URI of the file next to the palette that describes it, or shows its colours (".png")."""
    return palette.removesuffix(".npy") + ending


def swatches(palette: Palette) -> NDArray[np.uint8]:
    """An image of all colours: greys on the left, then hues; each column from dark to bright. About twice as wide as
    high."""
    rgb = palette.decode(np.arange(len(palette)))
    rows = int(np.ceil(np.sqrt(len(rgb) / 2)))
    red, green, blue = rgb.astype(np.float64).T
    lightness = 0.299 * red + 0.587 * green + 0.114 * blue
    a, b = red - (green + blue) / 2, np.sqrt(0.75) * (green - blue)  # hue and chroma are angle and length of (a, b)
    chroma = np.hypot(a, b)
    grey = chroma <= np.quantile(chroma, 0.25)  # hue is noise for low chroma
    order = np.lexsort([np.where(grey, chroma, np.arctan2(b, a)), ~grey])
    columns = [rgb[c[np.argsort(lightness[c], kind="stable")]] for c in np.split(order, range(rows, len(order), rows))]
    picture = np.full((rows, len(columns), 3), 255, np.uint8)
    for x, column in enumerate(columns):
        picture[: len(column), x] = column
    return images.sheet([list(row[:, None, None]) for row in picture], scale=16 if rows <= 64 else 4, gap=1)


def nearest_float64(colours: NDArray[np.float32], rgb: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Reference for `nearest_table`: brute force in float64, the lowest index on a tie. (M, 3) -> (M,)."""
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
    """8-bit to [-1, 1], as in OpenAI's `src/utils.py: color_quantize_np`."""
    return rgb.astype(np.float32) / np.float32(127.5) - np.float32(1)


def psnr(rgb: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.mean((rgb.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
