"""Structure of a PNG: its chunks, their checksums, the size of its pixel data and its transparent colour.

PIL checks neither the checksums of pixel data nor missing rows, which it would leave black.
"""

import struct
import zlib
from collections.abc import Iterator

from igpt_ray.errors import ImageError

MAGIC = b"\x89PNG\r\n\x1a\n"
KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""The chunks that determine pixels. Others (text, EXIF, profiles) are removed, so that damage in them is ignored."""
MAX_CHUNKS = 1 << 18
"""Most chunks of a PNG: each takes memory, while an empty one has twelve bytes. Encoders write at most one per row."""
GREY, RGB, PALETTE = 0, 2, 3
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, 4: 2, 6: 4}
"""Channels per colour type: grey, RGB, palette, grey and alpha, RGB and alpha."""
DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits per channel that the standard allows for each colour type."""
WHOLE = ((0, 0, 1, 1),)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, column step and row step of each pass of an interlaced image."""
INPUT, OUTPUT = 1 << 16, 1 << 20
"""Bytes that go into the decompressor at once, and the most that it returns."""


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height. Raises `ImageError` if the header is missing or its colour type and depth do not exist."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise ImageError("damaged PNG: it does not start with its header")
    depth, colour_type = data[24:26]
    if depth not in DEPTHS.get(colour_type, ()):
        raise ImageError(f"damaged PNG: colour type {colour_type} with {depth} bits per channel does not exist")
    return struct.unpack(">II", data[16:24])


def checked(data: bytes) -> tuple[bytes, tuple[int, ...]]:
    """Check the file. Returns it without the chunks that do not determine pixels, and its transparent colour.

    The transparent colour of a grey or RGB image is removed, because PIL compares it with pixels of another depth. It
    is a tuple of one or three integers, in units of the file, and empty if there is none.
    """
    depth, colour_type, interlaced = data[24], data[25], data[28]
    chunks: dict[bytes, list[memoryview]] = {name: [] for name in KEPT}
    for name, chunk in _chunks(data):
        chunks.get(name, []).append(chunk)
    if colour_type == PALETTE and not chunks[b"PLTE"]:
        raise ImageError("damaged PNG: its palette is missing")
    transparent: tuple[int, ...] = ()
    if colour_type in (GREY, RGB) and (last := chunks.pop(b"tRNS")[-1:]):
        n = CHANNELS[colour_type]
        if len(last[0]) != 12 + 2 * n:
            raise ImageError(f"damaged PNG: its transparent colour has {len(last[0]) - 12} bytes, expected {2 * n}")
        transparent = tuple(sample & (1 << depth) - 1 for sample in struct.unpack_from(f">{n}H", last[0], 8))
    expected = 0
    width, height = size_of(data)
    for left, top, right, down in ADAM7 if interlaced else WHOLE:
        columns, rows = -((left - width) // right), -((top - height) // down)
        expected += rows * (1 + -(-columns * CHANNELS[colour_type] * depth // 8)) if columns > 0 else 0
    size = _inflated_size([chunk[8:-4] for chunk in chunks[b"IDAT"]], expected)
    if size != expected:
        raise ImageError(f"damaged PNG: {size} bytes of rows, expected {expected} from its header")
    return MAGIC + b"".join(chunk for name in chunks for chunk in chunks[name]), transparent


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield (name, whole chunk), up to and including IEND."""
    view, at, name, n = memoryview(data), len(MAGIC), b"", 0
    while name != b"IEND":
        if (n := n + 1) > MAX_CHUNKS:
            raise ImageError(f"a PNG of more than {MAX_CHUNKS} chunks")
        name = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            raise ImageError("damaged PNG: the file is truncated")
        if name in KEPT and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ImageError(f"damaged PNG: the checksum of its chunk {name!r} is wrong")
        yield name, view[at:end]
        at = end


def _inflated_size(parts: list[memoryview], limit: int) -> int:
    """The decompressed size of a zlib stream, counted up to slightly over `limit`, in bounded memory."""
    inflate, size = zlib.decompressobj(), 0
    for part in parts:
        for start in range(0, len(part), INPUT):
            tail: bytes | memoryview = part[start : start + INPUT]
            while tail and not inflate.eof:
                size += len(inflate.decompress(tail, OUTPUT))
                tail = inflate.unconsumed_tail
                if size > limit:
                    return size
    size += len(inflate.flush())
    if not inflate.eof:
        raise ImageError("damaged PNG: its pixel data are truncated")
    return size
