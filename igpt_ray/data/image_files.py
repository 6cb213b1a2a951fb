"""Encoded pictures: JPEG, PNG and WebP bytes -> RGB, or an `ImageError` that says in a line why not.

Both pixel pipelines read through here, so they read and refuse the same files. What is refused: other formats, more
pixels than MAX_PIXELS by the header (before anything is decoded), files that are cut, and all damage that shows: the
decoders would fill what is missing with black or grey and say nothing.

How what is not plain RGB is read: transparency is laid on white; of 16 bits the upper 8 count; CMYK is taken as Adobe
writes it, inverted; of an animation the first picture counts; EXIF is not looked at, so its orientation is not applied,
as nobody did on ImageNet; bytes after the end of the picture are ignored.
"""

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from igpt_ray.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 1 << 26
"""Largest picture that is decoded, by its header (67 megapixels; ImageNet's largest has 28)."""
MAX_SCANS = 256
"""Passes over the picture that a JPEG may ask for; encoders use about ten."""

RGB = NDArray[np.uint8]


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
    header = header_of(data)
    with _named_damage(header.format):
        if header.format == "JPEG":
            # PIL drops libjpeg's warnings: decode once more, as small as can be, to hear them.
            scaled_jpeg(data, header, 1 if min(header.width, header.height) >= 16 else 8)
        elif header.format == "PNG":
            data = _checked_png(data, header)
        with Image.open(io.BytesIO(data), formats=[header.format]) as picture:
            if picture.size != (header.width, header.height):
                raise ImageError(f"damaged {header.format}: {header.width} x {header.height} or {picture.size}?")
            return _rgb(picture)


def header_of(data: bytes) -> Header:
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


def scaled_jpeg(data: bytes, header: Header, eighths: int) -> RGB:
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
        if not piece and not inflate.eof:
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
