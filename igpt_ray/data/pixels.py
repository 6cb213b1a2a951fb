"""Pixel pipelines: encoded image -> RGB -> the view that is tokenized; and RGB -> PNG.

A pixel pipeline has a name and a version, because the choice of decoder, filter and crop changes a third of all tokens.
Palettes, shards and releases record it, and a mismatch is an error. All pipelines accept the same files.

The view `imagenet` is the paper's (section 3.1). Centre: shorter side to 224, bicubic; centre crop 224; box filter down
to n_px. Random: shorter side to a random length in [256, 384], random 224 crop, box. The paper does not state the last
filter; box is the common choice of ports. An image of exactly n_px x n_px gets the view `direct` instead, because
enlarging it to 224 and reducing it again changes 28 % of CIFAR's tokens. `imagenet-1`, of older stores, has no such
exception.

The view `direct` is for images that are small by nature, as the paper uses CIFAR and STL-10. Centre: the centre square,
box filter to n_px; an image of n_px x n_px is not changed. Random: the centre view, padded by reflection with n_px // 8
pixels (4 at 32), a random n_px crop, and a mirror image with probability 1/2 (section 3.1).

`reference` computes both with PIL. `fast` decodes JPEGs with simplejpeg and computes `imagenet` in one step on a
smaller image. libjpeg-turbo decodes a JPEG directly at 1/2, 1/4 or 1/8 of its size, provided that `DETAIL` decoded
pixels remain per output pixel; PIL decodes other formats at full size. The two resizes and the crop are linear and
separable, so they are one small matrix for the rows and one for the columns. Rounding happens once, at the end, while
the reference rounds after every pass.
"""

import hashlib
import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igpt_ray.data.config import PipelineName, PixelsConfig, ViewName
from igpt_ray.data.image_files import MAX_PIXELS, RGB, Header, decode, header_of, scaled_jpeg
from igpt_ray.errors import ImageError

VERSIONS: dict[ViewName, str] = {"imagenet": "2", "direct": "direct-1", "imagenet-1": "1"}
PIPELINES: dict[str, tuple[PipelineName, ViewName]] = {
    f"{name}-{version}": (name, view) for name in ("fast", "reference") for view, version in VERSIONS.items()
}
"""Identifier -> the settings that select it."""
FAST = "fast-2"
REFERENCE = "reference-2"

CROP = 224
SHORTER_SIDE = (256, 384)
DETAIL = 4
"""`fast`: least number of decoded pixels per output pixel, along a side of the crop. On ImageNet at
32 x 32 this keeps 53.5 dB and 94.6 % of the reference's tokens (centre), 54.7 dB and 95.5 % (random); 5 would keep
54.1 dB and 95.1 %, 57.5 dB and 97.4 %, at 10 % fewer images per second."""


class CropBox(NamedTuple):
    """The geometry of a view: resize to width x height, then crop CROP x CROP pixels at (left, top)."""

    width: int
    height: int
    left: int
    top: int


# ------------------------------------------------------------------------------------------------ views


Draws = tuple[int, int, int]
"""Three random integers below 2^64 that determine a random view."""


def pipeline_id(pipeline: PipelineName, view: ViewName) -> str:
    """The identifier that palettes, stores and releases record, such as `fast-2`."""
    return f"{pipeline}-{VERSIONS[view]}"


def settings_hint(pipeline: str) -> str:
    """What to set so that `pipeline` is used."""
    if pipeline not in PIPELINES:
        return f"this version has {', '.join(PIPELINES)}"
    return "set --pixels.pipeline {} --pixels.view {}".format(*PIPELINES[pipeline])


def centre_view(data: bytes, n_px: int, pipeline: str = FAST) -> RGB:
    """The evaluation view of an encoded image: (n_px, n_px, 3)."""
    return _view(data, n_px, pipeline, None)


def random_view(data: bytes, n_px: int, key: str, view: int, pipeline: str = FAST) -> RGB:
    """The training view, a function of (key, view), so that a repeat gives the same pixels."""
    digest = hashlib.sha256(f"{key}\0{view}".encode()).digest()  # a library's generator may change between versions
    first, second, third = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8, 16))
    return _view(data, n_px, pipeline, (first, second, third))


def configured_view(data: bytes, settings: PixelsConfig, pipeline: str, training: bool, key: str, view: int) -> RGB:
    """The random view for training images with `crop="random"`, the centre view otherwise.

    `pipeline` is the identifier in a store, which may be older than the one that `settings` select today.
    """
    if training and settings.crop == "random":
        return random_view(data, settings.n_px, key, view, pipeline)
    return centre_view(data, settings.n_px, pipeline)


def _view(data: bytes, n_px: int, pipeline: str, draws: Draws | None) -> RGB:
    if pipeline not in PIPELINES:
        raise ImageError(f"unknown pixel pipeline {pipeline!r}: {settings_hint(pipeline)}")
    name, view = PIPELINES[pipeline]
    header = header_of(data)
    if view == "direct" or (view == "imagenet" and header.width == header.height == n_px):
        return _direct(data, header, n_px, name, draws)
    crop_box = _crop_box(header.width, header.height, draws)
    if name == "reference":
        return _reference(data, n_px, crop_box)
    return _fast(data, header, n_px, crop_box, _side_of if draws else _cached_side_of)


def _direct(data: bytes, header: Header, n_px: int, name: PipelineName, draws: Draws | None) -> RGB:
    rgb = scaled_jpeg(data, header, 8) if name == "fast" and _is_rgb_jpeg(header) else decode(data)
    side = min(header.width, header.height)
    left, top = (header.width - side) // 2, (header.height - side) // 2
    box = (left, top, left + side, top + side)
    view = np.asarray(Image.fromarray(rgb).resize((n_px, n_px), Image.Resampling.BOX, box))
    if draws is None:
        return view
    pad = n_px // 8
    top, left = (draw % (2 * pad + 1) for draw in draws[:2])
    crop = np.pad(view, ((pad, pad), (pad, pad), (0, 0)), "reflect")[top : top + n_px, left : left + n_px]
    return np.ascontiguousarray(crop[:, :: -1 if draws[2] % 2 else 1])


def _is_rgb_jpeg(header: Header) -> bool:
    return header.format == "JPEG" and header.colours == "RGB"


# ------------------------------------------------------------------------------------------------ imagenet


def _crop_box(width: int, height: int, draws: Draws | None) -> CropBox:
    """The centre crop, or the crop that `draws` determine."""
    if draws is None:
        width, height = _resized(width, height, CROP)
        return CropBox(width, height, (width - CROP) // 2, (height - CROP) // 2)
    length, left, top = draws
    width, height = _resized(width, height, SHORTER_SIDE[0] + length % (SHORTER_SIDE[1] - SHORTER_SIDE[0] + 1))
    return CropBox(width, height, left % (width - CROP + 1), top % (height - CROP + 1))


def _resized(width: int, height: int, length: int) -> tuple[int, int]:
    """Width and height after the shorter side is resized to `length`."""
    scale = length / min(width, height)
    return max(length, round(width * scale)), max(length, round(height * scale))


def _reference(data: bytes, n_px: int, crop_box: CropBox) -> RGB:
    picture = Image.fromarray(decode(data))
    if crop_box.width * crop_box.height <= MAX_PIXELS:
        resized = picture.resize((crop_box.width, crop_box.height), Image.Resampling.BICUBIC)
        cut = resized.crop((crop_box.left, crop_box.top, crop_box.left + CROP, crop_box.top + CROP))
    else:  # 1 x 60,000 pixels become three billion: resize only the crop, which rounds differently
        across, down = picture.width / crop_box.width, picture.height / crop_box.height
        left, top = crop_box.left * across, crop_box.top * down
        box = (left, top, min(left + CROP * across, picture.width), min(top + CROP * down, picture.height))
        cut = picture.resize((CROP, CROP), Image.Resampling.BICUBIC, box)
    return np.asarray(cut.resize((n_px, n_px), Image.Resampling.BOX))


# ------------------------------------------------------------------------------------------------ imagenet, fast

# Matrices hold integers, in units of 2**-ROW_BITS and 2**-COLUMN_BITS, so that every partial sum of either product is
# an integer that its float type holds exactly: 8 bits of pixel, 15 of weight, and one because the absolute values of
# the weights sum to less than 2, make 24 for float32; the second product takes 45 of float64's 53. No intermediate
# result is rounded, so the bytes do not depend on the summation order, threads or instructions of BLAS.
ROW_BITS = 15
COLUMN_BITS = 20


BAND = 8
FOLDED_PIXELS = 1 << 21
"""Most pixels that are converted to floats at once: 24 MiB. Usual images have fewer in a band."""


class ResizeRows(NamedTuple):
    """A band of rows (or columns) of a view: a matrix times pixels `first` to `last` of the decoded image."""

    first: int
    last: int
    matrix: NDArray[Any]  # (BAND or fewer, last - first), integers


ResizeMatrix = tuple[ResizeRows, ...]


def _fast(data: bytes, header: Header, n_px: int, crop_box: CropBox, side_of: Callable[..., ResizeMatrix]) -> RGB:
    scalable = _is_rgb_jpeg(header)
    eighths = _eighths(header, crop_box, n_px) if scalable else 8
    rgb = scaled_jpeg(data, header, eighths) if scalable else decode(data)
    rows = side_of(header.height, crop_box.height, crop_box.top, eighths, n_px, ROW_BITS)
    return _fold(rgb, rows, side_of(header.width, crop_box.width, crop_box.left, eighths, n_px, COLUMN_BITS), n_px)


def _fold(rgb: RGB, rows: ResizeMatrix, columns: ResizeMatrix, n_px: int) -> RGB:
    """(H, W, 3) -> (n_px, n_px, 3), rows first."""
    left, right = columns[0].first, max(band.last for band in columns)
    squeezed = np.empty((n_px, (right - left) * 3), np.float32)
    for i, band in enumerate(rows):
        height = band.last - band.first
        step = max(1, FOLDED_PIXELS // height)
        for start in range(left, right, step):
            stop = min(start + step, right)
            pixels = rgb[band.first : band.last, start:stop].astype(np.float32).reshape(height, -1)
            out = squeezed[i * BAND : (i + 1) * BAND, 3 * (start - left) : 3 * (stop - left)]
            np.matmul(band.matrix, pixels, out=out)
    wide = squeezed.T.astype(np.float64, order="C").reshape(right - left, 3 * n_px)
    folded = np.empty((n_px, 3 * n_px))
    for i, band in enumerate(columns):
        np.matmul(band.matrix, wide[band.first - left : band.last - left], out=folded[i * BAND : (i + 1) * BAND])
    view = np.rint(folded * 2.0 ** -(ROW_BITS + COLUMN_BITS)).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(view.reshape(n_px, 3, n_px).transpose(2, 0, 1))


def _eighths(header: Header, crop_box: CropBox, n_px: int) -> int:
    """Decoding scale in eighths. The inverse transforms of the other multiples of 1/8 are slower than full size."""
    crop = min(header.width, header.height) * CROP / min(crop_box.width, crop_box.height)  # in pixels of the image
    return next((k for k in (1, 2, 4) if crop * k >= 8 * DETAIL * n_px), 8)


def _side_of(n_in: int, n_resized: int, offset: int, eighths: int, n_px: int, bits: int) -> ResizeMatrix:
    """The two resizes and the crop of one side as matrices on the decoded pixels, in units of 2**-bits.

    An image decoded at k/8 has ceil(n_in * k / 8) pixels along a side. The last one may lie partly outside the image,
    so the length is n_in * k / 8 and not the number of pixels.
    """
    first, weights = _bicubic(n_in * eighths / 8, -(-n_in * eighths // 8), n_resized, offset)
    boxes = _boxes(n_px)
    lefts, rights = first[boxes.starts], first[boxes.ends] + len(weights)  # each band needs only a part of the image
    width = int((rights - lefts).max())
    into = (boxes.box * width + first - lefts[boxes.band])[:, None] + np.arange(len(weights))
    summed = np.bincount(into.ravel(), weights.T.ravel(), n_px * width).reshape(n_px, width)
    dtype = np.float32 if bits == ROW_BITS else np.float64
    whole: NDArray[np.floating] = np.rint(summed * (2.0**bits / boxes.sizes)).astype(dtype)
    return tuple(
        ResizeRows(left, right, whole[i * BAND : (i + 1) * BAND, : right - left])
        for i, (left, right) in enumerate(zip(lefts.tolist(), rights.tolist(), strict=True))
    )


_cached_side_of = lru_cache(maxsize=2048)(_side_of)
"""For the centre view, whose matrices are the same for images of one size."""


def _bicubic(length: float, n_in: int, n_out: int, offset: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """PIL's bicubic resize with antialiasing from `length` (covered by n_in pixels) to n_out pixels.

    For output pixels offset .. offset + CROP: the first input pixel (CROP,) and the weights from it on (taps, CROP).
    """
    scale = length / n_out
    widened = max(scale, 1.0)
    support = 2 * widened
    centres = (offset + 0.5 + np.arange(CROP)) * scale
    n_taps = min(int(np.ceil(2 * support)), n_in)
    first = np.minimum(np.maximum((centres - support + 0.5).astype(np.int64), 0), n_in - n_taps)
    x = np.abs((first - centres) + (np.arange(n_taps) + 0.5)[:, None]) / widened
    u, v = np.maximum(2 - x, 0), np.maximum(1 - x, 0)
    weights = u * u * (u - 1) * 0.5 + v * v * (1 - 2 * v)  # Keys' kernel with a = -1/2: one cubic from 0 to 1, one to 2
    return first, weights / weights.sum(0)


class Boxes(NamedTuple):
    """PIL's box resize from CROP to n_px pixels, and the bands of its output."""

    box: NDArray[np.int64]
    """(CROP,): the output pixel of each input pixel."""
    sizes: NDArray[np.int64]
    """(n_px, 1): the number of input pixels of each output pixel."""
    band: NDArray[np.int64]
    """(CROP,): the band of each input pixel."""
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    """(bands,): the first and the last input pixel of each band."""


@lru_cache(maxsize=16)
def _boxes(n_px: int) -> Boxes:
    box = np.ceil((np.arange(CROP) + 0.5) * n_px / CROP).astype(np.int64) - 1  # a centre on an edge belongs to the left
    starts = np.searchsorted(box, np.arange(0, n_px, BAND))
    ends = np.append(starts[1:], CROP) - 1
    return Boxes(box, np.bincount(box, minlength=n_px)[:, None], box // BAND, starts, ends)


def mean_alpha(data: bytes, n_px: int) -> NDArray[np.uint8]:
    """(n_px, n_px) mean alpha over the boxes of a PNG's centre square; 255 everywhere if it has no transparency."""
    if header_of(data).format != "PNG":
        raise ImageError("expected a PNG, because a mask is its transparency")
    decode(data)  # raises if the file is truncated or damaged
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        alpha = picture.convert("RGBA").getchannel("A")
    side = min(alpha.size)
    left, top = (alpha.width - side) // 2, (alpha.height - side) // 2
    square = alpha.resize((n_px, n_px), Image.Resampling.BOX, (left, top, left + side, top + side))
    return np.asarray(square)


# ------------------------------------------------------------------------------------------------ back to files


def png(rgb: RGB) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG")
    return out.getvalue()


def sheet(rows: list[list[RGB]], scale: int = 1, gap: int = 2, wide_gaps: tuple[int, ...] = ()) -> RGB:
    """Arrange images of one size in rows on white, enlarged without smoothing. A wider gap precedes the columns in
    `wide_gaps`. Returns one (H, W, 3) image."""
    side = rows[0][0].shape[0] * scale
    lefts = []
    x = gap
    for column in range(len(rows[0])):
        x += 4 * gap if column in wide_gaps else 0
        lefts.append(x)
        x += side + gap
    canvas = np.full((len(rows) * (side + gap) + gap, x, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        top = gap + r * (side + gap)
        for left, tile in zip(lefts, row, strict=True):
            canvas[top : top + side, left : left + side] = tile.repeat(scale, axis=0).repeat(scale, axis=1)
    return canvas
