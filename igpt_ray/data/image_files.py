"""Decode JPEG, PNG and WebP images to RGB, with strict checks; errors are an `ImageError` of one line.

Both pixel pipelines use this module, so they accept and reject the same files. Rejected are other formats, images whose
header has more than MAX_PIXELS pixels (before decoding), truncated files, and all damage that can be detected: the
decoders would silently fill missing pixels with black or grey.

Conversions to RGB: transparent pixels are composited on white; of 16-bit channels the upper 8 bits are used; CMYK is
read as inverted, as Adobe writes it; of an animation the first frame is used. EXIF orientation is not applied, as is
usual for ImageNet. Bytes after the end of the image are ignored.
"""

import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from igpt_ray.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 1 << 26
"""Largest image that is decoded, by its header (67 megapixels; the largest in ImageNet has 28)."""
MAX_SCANS = 256
"""Most scans of a JPEG; encoders write about ten."""

RGB = NDArray[np.uint8]


class Header(NamedTuple):
    """Format and size from the header of a file."""

    format: str
    width: int
    height: int
    colours: str = "RGB"
    """Colour space of the decoded pixels: RGB, or CMYK, which libjpeg does not convert."""


def decode(data: bytes) -> RGB:
    """Decode `data` at full size to (H, W, 3) uint8 RGB. The magic bytes select the decoder, not the file name.

    Raises `ImageError` if it is not a JPEG, PNG or WebP, is truncated or damaged, or is larger than `MAX_PIXELS`.
    """
    header = header_of(data)
    with _named_damage(header.format):
        if header.format == "JPEG":
            # PIL drops libjpeg's warnings: decode a second time at the smallest scale to detect them.
            scaled_jpeg(data, header, 1 if min(header.width, header.height) >= 16 else 8)
            data = _cleaned_jpeg(data)
        elif header.format == "PNG":
            data = _checked_png(data, header)
        with Image.open(io.BytesIO(data), formats=[header.format]) as picture:
            if picture.size != (header.width, header.height):
                raise ImageError(f"damaged {header.format}: {header.width} x {header.height} or {picture.size}?")
            return _rgb(picture)


def header_of(data: bytes) -> Header:
    """Read the header, and raise `ImageError` above MAX_PIXELS, because decoders allocate the size in the header."""
    format = _format(data)
    with _named_damage(format):
        header = {"JPEG": _jpeg_header, "PNG": _png_header, "WEBP": _webp_header}[format](data)
    if header.width * header.height > MAX_PIXELS:
        raise ImageError(f"{header.width} x {header.height} pixels: more than the limit of {MAX_PIXELS}")
    if header.width * header.height == 0:
        raise ImageError(f"{header.width} x {header.height} pixels: the image is empty")
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


LOSSLESS = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}
"""Frame markers of lossless and hierarchical JPEGs (ITU T.81, table B.1). libjpeg-turbo writes out of bounds when it
decodes a lossless JPEG at a reduced scale."""
START_OF_SCAN = 0xDA
MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
"""A marker, but not a restart marker or a stuffed byte of pixel data."""


def _jpeg_header(data: bytes) -> Header:
    for marker, _ in _jpeg_segments(data):
        if marker in LOSSLESS:
            raise ImageError("a lossless or hierarchical JPEG is not supported: convert it to PNG")
        if marker == START_OF_SCAN:
            break
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    return Header("JPEG", int(width), int(height), "CMYK" if colours in ("CMYK", "YCCK") else "RGB")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, offset of the segment's length) up to the end of the image; other bytes in between are skipped."""
    at = 2
    while (found := MARKER.search(data, at)) and found[1] != b"\xd9":
        yield found[1][0], found.end()
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")


def scaled_jpeg(data: bytes, header: Header, eighths: int) -> RGB:
    """Decode a JPEG at eighths/8 of its size.

    Decoding is strict, because libjpeg only warns when it fills missing data with grey or meets corrupt data. A file
    with a warning is decoded again without the parts that do not determine pixels.
    """
    size: dict[str, int] = {}
    if eighths < 8:
        size = {"min_height": -(-header.height * eighths // 8), "min_width": -(-header.width * eighths // 8)}
    with _named_damage("JPEG"):
        _check_scans(data)
        try:
            return simplejpeg.decode_jpeg(data, header.colours, strict=True, **size)
        except ValueError:
            data = _cleaned_jpeg(data)
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
JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
ADOBE = 0xEE


def _cleaned_jpeg(data: bytes) -> bytes:
    """The file without stray bytes between segments and without metadata, whose damage does not matter.

    Kept are tables, frames and scans, and the two application segments that determine the colour space: JFIF (replaced
    by version 1.1) and Adobe's. The spectral parameters of sequential scans, which decoders ignore, are corrected.
    """
    parts, sequential, end = [data[:2]], False, 2
    for marker, at in _jpeg_segments(data):
        end = at + int.from_bytes(data[at : at + 2], "big")
        segment = data[at - 2 : end]
        if marker == 0xE0:
            segment = JFIF if segment[4:9] == b"JFIF\0" and len(segment) >= len(JFIF) else b""
        elif 0xE0 <= marker <= 0xFE and marker != ADOBE:
            segment = b""
        elif marker == START_OF_SCAN:
            following = MARKER.search(data, end)
            pixels = data[end : following.start() if following else len(data)]
            segment = (segment[:-3] + b"\0\x3f\0" if sequential else segment) + pixels
        sequential = sequential or marker in (0xC0, 0xC1)
        parts.append(segment)
    return b"".join(parts) + (b"\xff\xd9" if MARKER.search(data, end) else b"")


def _check_scans(data: bytes) -> None:
    """Limit the scans: a few kilobytes can hold thousands of empty ones, each of which costs a pass over the image."""
    components, n_scans = 0, 0
    for marker, at in _jpeg_segments(data):
        if marker in (0xC0, 0xC1):  # sequential: a scan with all components is the only scan
            components = data[at + 7]
        elif marker == START_OF_SCAN:
            n_scans += 1
            if data[at + 2] == components:
                return
            if n_scans > MAX_SCANS:
                raise ImageError(f"a JPEG of more than {MAX_SCANS} scans")


# ------------------------------------------------------------------------------------------------ PNG

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""The chunks that determine pixels. Others (text, EXIF, profiles) are removed, so that damage in them is ignored."""
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Channels per colour type: grey, RGB, palette, grey and alpha, RGB and alpha."""
WHOLE = ((0, 0, 1, 1),)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, column step and row step of each pass of an interlaced image."""


def _png_header(data: bytes) -> Header:
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise ImageError("damaged PNG: it does not start with its header")
    return Header("PNG", int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))


def _checked_png(data: bytes, header: Header) -> bytes:
    """Check the file, and return it without the chunks that do not determine pixels.

    PIL checks neither the checksums of pixel data nor missing rows, which it would leave black.
    """
    chunks = list(_png_chunks(data))
    chunk_data = {name: b"".join(whole for n, whole in chunks if n == name) for name in PNG_CHUNKS}
    depth, colour_type, interlaced = data[24], data[25], data[28]
    if colour_type == 3 and not chunk_data[b"PLTE"]:
        raise ImageError("damaged PNG: its palette is missing")
    if depth == 16 and chunk_data[b"tRNS"]:  # PIL compares its 16 bits with 8 bits of the pixels
        raise ImageError("a 16-bit PNG with a transparent colour is not supported")
    expected = 0
    for left, top, right, down in ADAM7 if interlaced else WHOLE:
        width, height = -((left - header.width) // right), -((top - header.height) // down)
        expected += height * (1 + -(-width * CHANNELS[colour_type] * depth // 8)) if width > 0 else 0
    rows = _inflated_size(b"".join(whole[8:-4] for name, whole in chunks if name == b"IDAT"), expected)
    if rows != expected:
        raise ImageError(f"damaged PNG: {rows} bytes of rows, expected {expected} from its header")
    return PNG_MAGIC + b"".join(chunk_data.values())


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, whole chunk), up to and including IEND."""
    at, name = len(PNG_MAGIC), b""
    while name != b"IEND":
        name = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            raise ImageError("damaged PNG: the file is truncated")
        if name in PNG_CHUNKS and zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ImageError(f"damaged PNG: the checksum of its chunk {name!r} is wrong")
        yield name, data[at:end]
        at = end


def _inflated_size(stream: bytes, limit: int) -> int:
    """The decompressed size of a zlib stream, counted up to slightly over `limit`, in bounded memory."""
    inflate, size = zlib.decompressobj(), 0
    while not inflate.eof and size <= limit:
        piece = inflate.decompress(stream, 1 << 20)
        stream = inflate.unconsumed_tail
        if not piece and not inflate.eof:
            raise ImageError("damaged PNG: its pixel data are truncated")
        size += len(piece)
    return size


# ------------------------------------------------------------------------------------------------ WebP


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
    return Header("WEBP", width, height)
