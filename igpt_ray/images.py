"""Pictures: bytes -> RGB -> the view that is tokenized, and back to PNG.

The pixel pipeline has a name and a version (`PIPELINE`), because the choice of decoder, filter and crop changes a
third of all tokens: palettes, shards and releases carry it and refuse a mismatch.

`reference-1` is the paper's chain (section 3.1) with PIL: full decode; shorter side to 224, bicubic; centre crop
224; box filter down to n_px. The random view: shorter side to a random length in [256, 384], random 224 crop, box.
The paper does not state the last filter; box is the common choice of ports.
"""

import hashlib
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igpt_ray.errors import ImageError

PIPELINE = "reference-1"
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 1 << 26
"""Largest picture that is decoded, by its header (67 megapixels; ImageNet's largest has 28)."""

RGB = NDArray[np.uint8]

CROP = 224
SHORTER_SIDE = (256, 384)


def decode(data: bytes) -> RGB:
    """The picture in `data` as (H, W, 3) uint8 RGB. The magic bytes decide the decoder, not the file's name.

    Raises `ImageError` if it is not a JPEG, PNG or WebP, is damaged, or is larger than `MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ImageError(f"{picture.width} x {picture.height} pixels: more than the limit of {MAX_PIXELS}")
            if picture.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip it to white
                grey = (np.asarray(picture) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.asarray(picture.convert("RGB"))
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"not a {', '.join(FORMATS)} (starts with {data[:12]!r})") from error
    except Exception as error:  # a decoder may raise anything on damaged input: SyntaxError, struct.error, ...
        raise ImageError(f"damaged picture ({type(error).__name__}: {error})") from error


def centre_view(rgb: RGB, n_px: int) -> RGB:
    """The paper's evaluation view: (H, W, 3) -> (n_px, n_px, 3)."""
    picture = _shorter_side_to(Image.fromarray(rgb), CROP)
    left, top = (picture.width - CROP) // 2, (picture.height - CROP) // 2
    return _crop(picture, left, top, n_px)


def random_view(rgb: RGB, n_px: int, key: str, view: int) -> RGB:
    """The paper's training view, drawn from (key, view) alone: a repeat gives the same pixels."""
    digest = hashlib.sha256(f"{key}\0{view}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    picture = _shorter_side_to(Image.fromarray(rgb), int(rng.integers(SHORTER_SIDE[0], SHORTER_SIDE[1] + 1)))
    left = int(rng.integers(picture.width - CROP + 1))
    top = int(rng.integers(picture.height - CROP + 1))
    return _crop(picture, left, top, n_px)


def png(rgb: RGB) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG")
    return out.getvalue()


def sheet(rows: list[list[RGB]], scale: int = 1, gap: int = 2, wide_gaps: tuple[int, ...] = ()) -> RGB:
    """Pictures of one size on white, row by row, enlarged without smoothing; columns in `wide_gaps` start after a
    wider gap. Returns one (H, W, 3) picture."""
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


def _shorter_side_to(picture: Image.Image, length: int) -> Image.Image:
    scale = length / min(picture.size)
    size = (max(length, round(picture.width * scale)), max(length, round(picture.height * scale)))
    if size[0] * size[1] > MAX_PIXELS:  # one pixel by many thousands: small in the file, vast once enlarged
        raise ImageError(f"{picture.width} x {picture.height} pixels: too narrow to resize to {length}")
    return picture.resize(size, Image.Resampling.BICUBIC)


def _crop(picture: Image.Image, left: int, top: int, n_px: int) -> RGB:
    box = (left, top, left + CROP, top + CROP)
    return np.asarray(picture.crop(box).resize((n_px, n_px), Image.Resampling.BOX))
