"""Decode JPEG, PNG and WebP images to RGB, with strict checks; errors are an `ImageError` of one line.

Both pixel pipelines use this module, so they accept and reject the same files. Rejected are other formats, images that
have more than MAX_PIXELS pixels or take more than MAX_BYTES of memory (by their header, before decoding), truncated
files, and all damage that can be detected: the decoders would silently fill missing pixels with black or grey.

Conversions to RGB: transparent pixels are composited on white; of 16-bit channels the upper 8 bits are used; CMYK is
read as inverted, as Adobe writes it; of an animation the first frame is used. EXIF orientation is not applied, as is
usual for ImageNet. Bytes after the end of the image are ignored.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from igpt_ray.data import jpeg_segments, png_chunks
from igpt_ray.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 1 << 26
"""Largest image that is decoded, by its header (67 megapixels; the largest in ImageNet has 28)."""
MAX_BYTES = 1 << 29
"""Most memory that decoding an image may take, the file included, by an estimate from its header."""
STRIP = 1 << 18
"""Pixels that are converted to RGB at once."""

RGB = NDArray[np.uint8]


class Header(NamedTuple):
    """Format and size from the header of a file."""

    format: str
    width: int
    height: int
    colours: Literal["RGB", "CMYK", "unknown"] = "RGB"
    """Colour space of a JPEG in simplejpeg: RGB, CMYK, or unknown if only PIL decodes its chroma sampling."""
    n_bytes: int = 0
    """Estimate of the memory that decoding takes, the file included."""


def decode(data: bytes) -> RGB:
    """Decode `data` at full size to (H, W, 3) uint8 RGB. The magic bytes select the decoder, not the file name.

    Raises `ImageError` if it is not a JPEG, PNG or WebP, is truncated or damaged, or is larger than `MAX_PIXELS` or
    `MAX_BYTES`.
    """
    header = header_of(data)
    if header.format == "JPEG":
        return scaled_jpeg(data, header, 8)
    with _named_damage(header.format):
        if header.format == "PNG":
            return _png(data, header)
        return _pil(data, header)


def header_of(data: bytes) -> Header:
    """Read the header, and raise `ImageError` above the limits, because decoders allocate the size in the header."""
    format = _format(data)
    with _named_damage(format):
        header = {"JPEG": _jpeg_header, "PNG": _png_header, "WEBP": _webp_header}[format](data)
    size = f"{header.width} x {header.height} pixels"
    if header.width * header.height > MAX_PIXELS:
        raise ImageError(f"{size}: more than the limit of {MAX_PIXELS}")
    if header.n_bytes > MAX_BYTES:
        raise ImageError(f"{size} take {header.n_bytes >> 20} MiB to decode: more than the limit of {MAX_BYTES >> 20}")
    if header.width * header.height == 0:
        raise ImageError(f"{size}: the image is empty")
    return header


def _format(data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(png_chunks.MAGIC):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    raise ImageError(f"not a {', '.join(FORMATS)} ({f'starts with {data[:12]!r}' if data else 'empty'})")


@contextmanager
def _named_damage(format: str) -> Iterator[None]:
    """Raise decoder errors as `ImageError`. On damaged input they have many types: SyntaxError, struct.error ..."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its text has the address of an object
        raise ImageError(f"damaged {format}: PIL cannot identify it") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"damaged {format}: {reason}") from error


# ------------------------------------------------------------------------------------------------ to RGB


def _pil(data: bytes, header: Header, raw_modes: dict[str, str] | None = None) -> RGB:
    """Decode with PIL. `raw_modes` replaces the layouts of samples that PIL derives from the header."""
    with _opened(data, header) as picture:
        if raw_modes:
            picture.tile = [tile._replace(args=raw_modes[str(tile.args)]) for tile in picture.tile]
        picture.load()
        rgb = np.empty((header.height, header.width, 3), np.uint8)
        for rows in _strips(header):
            rgb[rows] = _on_white(picture.crop((0, rows.start, header.width, rows.stop)))
    return rgb


def _opened(data: bytes, header: Header) -> ImageFile.ImageFile:
    picture = Image.open(io.BytesIO(data), formats=[header.format])
    if picture.size != (header.width, header.height):
        raise ImageError(f"damaged {header.format}: its sizes {header.width, header.height} and {picture.size} differ")
    return picture


def _strips(header: Header) -> Iterator[slice]:
    """Bands of rows, because temporary arrays of the whole image would multiply its memory."""
    step = max(1, STRIP // header.width)
    return (slice(top, min(top + step, header.height)) for top in range(0, header.height, step))


def _on_white(picture: Image.Image) -> RGB:
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
    frame = jpeg_segments.frame_of(data)
    n_pixels, stored = frame.width * frame.height, 2 * frame.stored
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError) as error:  # KeyError: -1, libjpeg-turbo's number of an unknown sampling
        if isinstance(error, ValueError) and "subsampling" not in str(error):
            raise
        n_bytes = int(n_pixels * (stored + 11)) + 20 * len(data)  # the result, and PIL's image and result of a check
        return Header("JPEG", frame.width, frame.height, "unknown", n_bytes)
    if (width, height) != (frame.width, frame.height):
        raise ImageError(f"damaged JPEG: its sizes {width, height} and {frame.width, frame.height} differ")
    if colours in ("CMYK", "YCCK"):
        return Header("JPEG", frame.width, frame.height, "CMYK", int(n_pixels * (stored + 7)) + 3 * len(data))
    return Header("JPEG", frame.width, frame.height, "RGB", int(n_pixels * (stored + 3)) + 3 * len(data))


def scaled_jpeg(data: bytes, header: Header, eighths: int) -> RGB:
    """Decode a JPEG at eighths/8 of its size, which must be 8 unless its colours are RGB.

    Decoding is strict, because libjpeg only warns when it fills missing data with grey or meets corrupt data. A file
    with a warning is decoded again without the parts that do not determine pixels.
    """
    with _named_damage("JPEG"):
        if header.colours == "unknown":
            return _unusual_jpeg(data, header)
        pixels = _strict_jpeg(data, header, eighths)
    if header.colours == "RGB":
        return pixels
    rgb = np.empty((header.height, header.width, 3), np.uint8)
    for rows in _strips(header):
        rgb[rows] = np.asarray(Image.fromarray(255 - pixels[rows], "CMYK").convert("RGB"))
    return rgb


def _strict_jpeg(data: bytes, header: Header, eighths: int) -> NDArray[np.uint8]:
    size: dict[str, int] = {}
    if eighths < 8:
        size = {"min_height": -(-header.height * eighths // 8), "min_width": -(-header.width * eighths // 8)}
    try:
        return simplejpeg.decode_jpeg(data, header.colours, strict=True, **size)
    except ValueError:
        data = jpeg_segments.cleaned(data)
    try:
        return simplejpeg.decode_jpeg(data, header.colours, strict=True, **size)
    except ValueError as error:
        warning = AFTER_LAST_BLOCK.search(str(error))
        end = len(data) - 2 - int(warning[1]) if warning else 0
        if len(data) - 2 - end < MIN_PADDING or len(set(data[end:-2])) != 1:
            raise
        return simplejpeg.decode_jpeg(data[:end] + data[-2:], header.colours, strict=True, **size)


AFTER_LAST_BLOCK = re.compile(r"(\d+) extraneous bytes before marker 0xd9$")
"""libjpeg's warning about bytes between the last block and the end marker."""
MIN_PADDING = 16
"""Least number of equal bytes before the end marker that count as padding. Other bytes there are a sign of damage: a
flipped bit can make the decoder reach the last block too early."""
ARBITRARY = bytes.fromhex("9e4185bdf30ba61d0376f1c68ae2495a28b417dc60935fe77c3ab8d12d5496ce")
"""Bytes that decode to other pixels than no bytes."""


def _unusual_jpeg(data: bytes, header: Header) -> RGB:
    """Decode a chroma sampling that simplejpeg does not support, with PIL.

    PIL drops libjpeg's warnings. If data are missing, the decoder reads the bytes that we append, and pixels change.
    """
    rgb = _pil(jpeg_segments.cleaned(data), header)
    with _opened(jpeg_segments.cleaned(data, ARBITRARY), header) as picture:
        picture.load()
        for rows in _strips(header):
            if not np.array_equal(rgb[rows], _on_white(picture.crop((0, rows.start, header.width, rows.stop)))):
                raise ImageError("damaged JPEG: premature end of its pixel data")
    return rgb


# ------------------------------------------------------------------------------------------------ PNG and WebP


def _png_header(data: bytes) -> Header:
    width, height = png_chunks.size_of(data)
    per_pixel = 11 if data[24:26] == b"\x10\2" else 7  # PIL's image and the result; twice the former if transparent
    n_bytes = width * (height * per_pixel + 32) + 2 * len(data)  # PIL and _on_white have temporary copies of a row
    return Header("PNG", width, height, n_bytes=n_bytes)


def _png(data: bytes, header: Header) -> RGB:
    data, colour = png_chunks.checked(data)
    rgb = _pil(data, header)
    if not colour:
        return rgb
    depth = data[24]
    planes = [(rgb, [sample >> 8 if depth == 16 else sample * 255 // ((1 << depth) - 1) for sample in colour])]
    if depth == 16:
        planes.append((_pil(data, header, LOW_BYTES), [sample & 255 for sample in colour]))
    for rows in _strips(header):
        rgb[rows][np.logical_and.reduce([(plane[rows] == samples).all(2) for plane, samples in planes])] = 255
    return rgb


LOW_BYTES = {"I;16B": "I;16", "RGB;16B": "RGB;16L"}
"""PIL's raw modes of 16-bit PNGs, and those of the other byte order, whose upper 8 bits are the lower 8 of the file."""


def _webp_header(data: bytes) -> Header:
    kind = data[12:16]
    if len(data) < max(25 if kind == b"VP8L" else 30, 8 + int.from_bytes(data[4:8], "little")):
        raise ImageError("damaged WEBP: the file is truncated")
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return Header("WEBP", width, height, n_bytes=width * height * 20 + 3 * len(data))
