"""Image files of formats and codings that the usual encoders do not write."""

import io
import struct
import zlib

from PIL import Image

from igpt_ray.data import png_chunks
from igpt_ray.data.image_files import RGB


def encoded(rgb: RGB, kind: str, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgb).convert(mode).save(out, kind, **options)
    return out.getvalue()


def png_of(width: int, height: int, rows: bytes, depth: int = 8, colours: int = 2, more: bytes = b"") -> bytes:
    """A PNG with valid checksums and an arbitrary header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return png_chunks.MAGIC + header + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def jpeg_of(luma: RGB, across: int, down: int, restart: int = 0) -> bytes:
    """A baseline JPEG of blocks of 8 x 8 equal greys, whose luma has across x down blocks per block of either chroma.

    All coefficients but the first are zero. The first has a quantisation of 8, so that it is the grey minus 128.
    """
    rows, columns = luma.shape
    bits, intervals, last = "", [], 0
    mcus = [(y, x) for y in range(0, rows, down) for x in range(0, columns, across)]
    for i, (top, left) in enumerate(mcus):
        for grey in luma[top : top + down, left : left + across].ravel().tolist():
            difference, last = grey - 128 - last, grey - 128
            size = abs(difference).bit_length()
            value = difference if difference >= 0 else difference + (1 << size) - 1
            bits += f"{size:04b}" + (f"{value:0{size}b}" if size else "") + "0"
        bits += "00000" * 2  # chroma: no difference, end of block
        if i + 1 == len(mcus) or (restart and (i + 1) % restart == 0):
            bits += "1" * (-len(bits) % 8)
            intervals.append(int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0"))
            bits, last = "", 0
    entropy = b"".join(part + bytes([0xFF, 0xD0 + i % 8]) for i, part in enumerate(intervals))[:-2]
    frame = struct.pack(">BHHB", 8, rows * 8, columns * 8, 3) + bytes([1, across << 4 | down, 0, 2, 17, 0, 3, 17, 0])
    sizes = b"\0" + bytes([0, 0, 0, 12]) + bytes(12) + bytes(range(12))  # twelve codes of four bits
    end_of_block = b"\x10" + bytes([1]) + bytes(15) + b"\0"  # one code of one bit
    scan = bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0])
    segments = [(0xDB, b"\0" + bytes([8] * 64)), (0xC0, frame), (0xC4, sizes), (0xC4, end_of_block)]
    segments += [(0xDD, struct.pack(">H", restart)), (0xDA, scan)]
    head = b"".join(struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body for marker, body in segments)
    return b"\xff\xd8" + head + entropy + b"\xff\xd9"


SAMPLINGS = [(3, 1), (3, 2), (4, 2), (1, 3), (2, 4), (2, 2)]
