"""Pictures: bytes -> RGB -> the view that is tokenized, and back to PNG.

A pixel pipeline has a name and a version, because the choice of decoder, filter and crop changes a third of all tokens:
palettes, shards and releases carry it and refuse a mismatch. All pipelines take the same crops and read the same files.

`reference-1` is the paper's chain (section 3.1) with PIL: full decode; shorter side to 224, bicubic; centre crop
224; box filter down to n_px. The random view: shorter side to a random length in [256, 384], random 224 crop, box.
The paper does not state the last filter; box is the common choice of ports.

`fast-1` computes the same in one step, on a smaller picture. libjpeg-turbo decodes a JPEG straight to 1/2, 1/4 or 1/8
of its size, as long as `DETAIL` pixels are left for each one wanted; other formats are decoded by PIL in full. The two
resizes and the crop are linear and act on rows and columns apart, so together they are one small matrix for each side.
Rounding happens once, at the end, where the reference rounds after every pass.

How both read what is not plain RGB: transparency is laid on white; of 16 bits the upper 8 count; CMYK is taken as
Adobe writes it, inverted; of an animation the first picture counts; EXIF orientation is not applied, nobody did on
ImageNet; bytes after the end of the picture are ignored.
"""

import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from igpt_ray.errors import ImageError

REFERENCE = "reference-1"
FAST = "fast-1"
PIPELINES = {"fast": FAST, "reference": REFERENCE}
"""The present version of each pipeline, by the name that settings use."""

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 1 << 26
"""Largest picture that is decoded, by its header (67 megapixels; ImageNet's largest has 28)."""
MAX_SCANS = 256
"""Passes over the picture that a JPEG may ask for; encoders use about ten."""

RGB = NDArray[np.uint8]

CROP = 224
SHORTER_SIDE = (256, 384)
DETAIL = 5
"""`fast`: pixels of the decoded picture's shorter side for each of n_px, at least. 4 would be 3 % faster on ImageNet,
but costs 0.7 dB there and 10 dB on pictures of 256 pixels."""


class Frame(NamedTuple):
    """Where a view lies: the picture is resized to width x height, then CROP x CROP pixels are cut at left, top."""

    width: int
    height: int
    left: int
    top: int


# ------------------------------------------------------------------------------------------------ views


def centre_view(data: bytes, n_px: int, pipeline: str = FAST) -> RGB:
    """The paper's evaluation view of an encoded picture: (n_px, n_px, 3)."""
    return _view(data, n_px, pipeline, _centre)


def random_view(data: bytes, n_px: int, key: str, view: int, pipeline: str = FAST) -> RGB:
    """The paper's training view, drawn from (key, view) alone: a repeat gives the same pixels."""
    return _view(data, n_px, pipeline, partial(_drawn, key, view))


def _view(data: bytes, n_px: int, pipeline: str, frame_of: Callable[[int, int], Frame]) -> RGB:
    if pipeline == FAST:
        return _fast(data, n_px, frame_of)
    if pipeline == REFERENCE:
        return _reference(data, n_px, frame_of)
    raise ImageError(f"no pixel pipeline {pipeline!r}: this version makes {FAST} and {REFERENCE}")


def _centre(width: int, height: int) -> Frame:
    width, height = _resized(width, height, CROP)
    return Frame(width, height, (width - CROP) // 2, (height - CROP) // 2)


def _drawn(key: str, view: int, width: int, height: int) -> Frame:
    digest = hashlib.sha256(f"{key}\0{view}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    width, height = _resized(width, height, int(rng.integers(SHORTER_SIDE[0], SHORTER_SIDE[1] + 1)))
    left = int(rng.integers(width - CROP + 1))
    return Frame(width, height, left, int(rng.integers(height - CROP + 1)))


def _resized(width: int, height: int, length: int) -> tuple[int, int]:
    """Width and height once the shorter side is `length`."""
    scale = length / min(width, height)
    resized = max(length, round(width * scale)), max(length, round(height * scale))
    if resized[0] * resized[1] > MAX_PIXELS:  # one pixel by many thousands: small in the file, vast once enlarged
        raise ImageError(f"{width} x {height} pixels: too narrow to resize to {length}")
    return resized


# ------------------------------------------------------------------------------------------------ reference-1


def _reference(data: bytes, n_px: int, frame_of: Callable[[int, int], Frame]) -> RGB:
    picture = Image.fromarray(decode(data))
    frame = frame_of(*picture.size)
    resized = picture.resize((frame.width, frame.height), Image.Resampling.BICUBIC)
    cut = resized.crop((frame.left, frame.top, frame.left + CROP, frame.top + CROP))
    return np.asarray(cut.resize((n_px, n_px), Image.Resampling.BOX))


# ------------------------------------------------------------------------------------------------ fast-1

# Matrices hold integers, in units of 2**-ROW_BITS and 2**-COLUMN_BITS, so that every partial sum of either product is
# an integer that its float type holds exactly: 8 bits of pixel, 15 of weight, and one because the absolute values of
# the weights sum to less than 2, make 24 for float32; the second product takes 45 of float64's 53. Nothing is rounded on
# the way, so BLAS may add in any order, in any number of threads, with any instructions: the bytes are the same.
ROW_BITS = 15
COLUMN_BITS = 20


class Side(NamedTuple):
    """What one side of a view is made of: pixels `first` to `last` of the decoded picture, times a matrix."""

    first: int
    last: int
    matrix: NDArray[np.float64]  # (n_px, last - first), integers


def _fast(data: bytes, n_px: int, frame_of: Callable[[int, int], Frame]) -> RGB:
    header = _header(data)
    frame = frame_of(header.width, header.height)
    scalable = header.format == "JPEG" and header.colours == "RGB"
    eighths = _eighths(min(header.width, header.height), n_px) if scalable else 8
    rgb = _jpeg(data, header, eighths) if scalable else decode(data)
    side = _kept_side if frame_of is _centre else _side
    rows = side(header.height, frame.height, frame.top, eighths, n_px, ROW_BITS)
    columns = side(header.width, frame.width, frame.left, eighths, n_px, COLUMN_BITS)
    return _fold(rgb, rows, columns)


def _fold(rgb: RGB, rows: Side, columns: Side) -> RGB:
    """(H, W, 3) -> (n_px, n_px, 3)."""
    n_px, width = len(rows.matrix), columns.last - columns.first
    cut = rgb[rows.first : rows.last, columns.first : columns.last].astype(np.float32)
    squeezed = rows.matrix.astype(np.float32) @ cut.reshape(len(cut), -1)  # (n_px, width * 3)
    turned = squeezed.reshape(n_px, width, 3).transpose(1, 0, 2).reshape(width, -1).astype(np.float64)
    view = (columns.matrix @ turned).reshape(n_px, n_px, 3).transpose(1, 0, 2)  # (column, row, 3) -> (row, column, 3)
    view = np.rint(view * 2.0 ** -(ROW_BITS + COLUMN_BITS))
    return np.ascontiguousarray(view.clip(0, 255).astype(np.uint8))


def _eighths(shorter: int, n_px: int) -> int:
    """The scale to decode at. The other multiples of 1/8 have slower inverse transforms than no scaling at all."""
    return next((k for k in (1, 2, 4) if shorter * k >= 8 * DETAIL * n_px), 8)


def _side(n_in: int, n_resized: int, offset: int, eighths: int, n_px: int, bits: int) -> Side:
    """One side's two resizes and its crop as a matrix on the decoded pixels.

    A picture decoded at k/8 has ceil(n_in * k / 8) pixels, the last of which may lie half outside the picture, so its
    length is n_in * k / 8 and not the number of its pixels.
    """
    first, weights = _bicubic(n_in * eighths / 8, -(-n_in * eighths // 8), n_resized, offset)
    box, sizes = _boxes(n_px)
    low, high = int(first[0]), int(first[-1]) + weights.shape[1]
    taps = first[:, None] - low + np.arange(weights.shape[1])  # (CROP, taps)
    into = (box[:, None] * (high - low) + taps).ravel()
    summed = np.bincount(into, weights.ravel(), n_px * (high - low)).reshape(n_px, high - low)
    return Side(low, high, np.rint(summed * (2.0**bits / sizes[:, None])))


_kept_side = lru_cache(maxsize=1024)(_side)  # of the centre view, which pictures of one size share


def _bicubic(length: float, n_in: int, n_out: int, offset: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """PIL's bicubic resize with antialiasing, of `length` (covered by n_in pixels) to n_out pixels.

    For output pixels offset .. offset + CROP: the first input pixel (CROP,), and the weights from there (CROP, taps).
    """
    scale = length / n_out
    widened = max(scale, 1.0)
    support = 2 * widened
    centres = (offset + np.arange(CROP) + 0.5) * scale
    n_taps = min(int(np.ceil(2 * support)), n_in)
    first = np.clip((centres - support + 0.5).astype(np.int64), 0, n_in - n_taps)
    x = np.abs(first[:, None] + np.arange(n_taps) + 0.5 - centres[:, None]) / widened
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return first, weights / weights.sum(1, keepdims=True)


@lru_cache(maxsize=16)
def _boxes(n_px: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """PIL's box resize of CROP to n_px pixels: the box that each pixel falls into, and how many fall into each."""
    box = np.ceil((np.arange(CROP) + 0.5) * n_px / CROP).astype(np.int64) - 1  # a centre on an edge belongs to the left
    return box, np.bincount(box, minlength=n_px)


# ------------------------------------------------------------------------------------------------ decoding


class Header(NamedTuple):
    """What a file says of itself."""

    format: str
    width: int
    height: int
    colours: str = "RGB"
    """What the decoder makes of it: RGB, or CMYK, which libjpeg leaves as it is."""


def decode(data: bytes) -> RGB:
    """The picture in `data` as (H, W, 3) uint8 RGB, in full. The magic bytes decide the decoder, not the file's name.

    Raises `ImageError` if it is not a JPEG, PNG or WebP, is cut or damaged, or is larger than `MAX_PIXELS`.
    """
    header = _header(data)
    with _named_damage(header.format):
        if (
            header.format == "JPEG"
        ):  # PIL drops libjpeg's warnings, so decode once more, as small as can be, to hear them
            _jpeg(data, header, 1 if min(header.width, header.height) >= 16 else 8)
        elif header.format == "PNG":
            data = _checked_png(data, header)
        with Image.open(io.BytesIO(data), formats=[header.format]) as picture:
            if picture.size != (header.width, header.height):
                raise ImageError(f"damaged {header.format}: {header.width} x {header.height} or {picture.size}?")
            return _rgb(picture)


def _header(data: bytes) -> Header:
    """Nothing larger than MAX_PIXELS gets past here: decoders allocate what a header says, some as they open a file."""
    format = _format(data)
    with _named_damage(format):
        header = {"JPEG": _jpeg_header, "PNG": _png_header, "WEBP": _webp_header}[format](data)
    if header.width * header.height > MAX_PIXELS:
        raise ImageError(f"{header.width} x {header.height} pixels: more than the limit of {MAX_PIXELS}")
    if header.width * header.height == 0:
        raise ImageError(f"{header.width} x {header.height} pixels: nothing to see")
    return header


def _format(data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(PNG_MAGIC):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    raise ImageError(f"not a {', '.join(FORMATS)} ({f'starts with {data[:12]!r}' if data else 'empty'})")


@contextmanager
def _named_damage(format: str) -> Iterator[None]:
    """A decoder may raise anything on damaged input: SyntaxError, struct.error ... It all becomes an `ImageError`."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"damaged {format}: {reason}") from error


def _rgb(picture: Image.Image) -> RGB:
    if picture.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip it to white
        grey = (np.asarray(picture) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("RGB"))
    rgba = np.asarray(picture.convert("RGBA")).astype(np.uint16)
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ JPEG


def _jpeg_header(data: bytes) -> Header:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    return Header("JPEG", int(width), int(height), "CMYK" if colours in ("CMYK", "YCCK") else "RGB")


def _jpeg(data: bytes, header: Header, eighths: int) -> RGB:
    """The picture at eighths/8 of its size.

    Strict, because libjpeg only warns when it fills what is missing with grey, or has lost its way after a flipped bit.
    """
    with _named_damage("JPEG"):
        _check_scans(data)
        if eighths == 8:
            return simplejpeg.decode_jpeg(data, header.colours, strict=True)
        height, width = -(-header.height * eighths // 8), -(-header.width * eighths // 8)
        return simplejpeg.decode_jpeg(data, header.colours, min_height=height, min_width=width, strict=True)


def _check_scans(data: bytes) -> None:
    """A few kilobytes can hold thousands of empty scans, each as much work as the whole picture."""
    at, components = 2, 0
    while data[at] == 0xFF and data[at + 1] != 0xDA:  # from marker to marker, up to the first scan
        if data[at + 1] in (0xC0, 0xC1):  # sequential, so a scan that holds all its components is the only one
            components = data[at + 9]
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if data[at + 4] != components and data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageError(f"a JPEG of more than {MAX_SCANS} scans")


# ------------------------------------------------------------------------------------------------ PNG

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""All that pixels depend on. The others (text, EXIF, profiles) are not shown to PIL: broken ones must not matter."""
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By colour type: grey, RGB, palette, grey and alpha, RGB and alpha."""
WHOLE = ((0, 0, 1, 1),)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and the steps between columns and rows, of every pass over an interlaced picture."""


def _png_header(data: bytes) -> Header:
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise ImageError("damaged PNG: it does not start with its header")
    return Header("PNG", int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))


def _checked_png(data: bytes, header: Header) -> bytes:
    """The file without the chunks that do not matter.

    PIL minds neither the checksums of pixels nor rows that are missing: it would leave them black.
    """
    chunks = list(_png_chunks(data))
    kept = {name: b"".join(whole for n, whole in chunks if n == name) for name in PNG_CHUNKS}
    depth, colour_type, interlaced = data[24], data[25], data[28]
    if colour_type == 3 and not kept[b"PLTE"]:
        raise ImageError("damaged PNG: its palette is missing")
    if depth == 16 and kept[b"tRNS"]:  # PIL compares the 16 bits of that colour with 8 bits of the pixels
        raise ImageError("a 16-bit PNG with a transparent colour, which is not read")
    expected = 0
    for left, top, right, down in ADAM7 if interlaced else WHOLE:
        width, height = -((left - header.width) // right), -((top - header.height) // down)
        expected += height * (1 + -(-width * CHANNELS[colour_type] * depth // 8)) if width > 0 else 0
    rows = _inflated_size(b"".join(whole[8:-4] for name, whole in chunks if name == b"IDAT"), expected)
    if rows != expected:
        raise ImageError(f"damaged PNG: {rows} bytes of rows, where its header says {expected}")
    return PNG_MAGIC + b"".join(kept.values())


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, the whole chunk), up to and with the last."""
    at, name = len(PNG_MAGIC), b""
    while name != b"IEND":
        name = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            raise ImageError("damaged PNG: the file is cut")
        if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ImageError(f"damaged PNG: the checksum of its chunk {name!r} is wrong")
        yield name, data[at:end]
        at = end


def _inflated_size(stream: bytes, limit: int) -> int:
    """How many bytes a zlib stream holds, counted up to a little over `limit`, without keeping them."""
    inflate, size = zlib.decompressobj(), 0
    while not inflate.eof and size <= limit:
        piece = inflate.decompress(stream, 1 << 20)
        stream = inflate.unconsumed_tail
        if not piece:
            raise ImageError("damaged PNG: its pixels are cut")
        size += len(piece)
    return size


# ------------------------------------------------------------------------------------------------ WebP


def _webp_header(data: bytes) -> Header:
    if len(data) < max(30, 8 + int.from_bytes(data[4:8], "little")):
        raise ImageError("damaged WEBP: the file is cut")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return Header("WEBP", width, height)


# ------------------------------------------------------------------------------------------------ back to files


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
