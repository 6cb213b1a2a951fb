"""python damaged_images.py SEED N [FOLDER ...]: decode N damaged images, and print one line of JSON for each.

The images are generated in every format that is decoded; those of the folders are added. Each is changed at random, and
read by both pixel pipelines. A line has the outcome: "read", or the text of the `ImageError`. Every other exception, a
crash or more than CPU_SECONDS for one image ends the process. The last line has the peak memory in MiB.
"""

import io
import json
import random
import signal
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from image_cases import SAMPLINGS, chunk, encoded, jpeg_of, png_of
from PIL import Image

from igpt_ray.data import pixels
from igpt_ray.errors import ImageError

CPU_SECONDS = 10
MAX_FILE = 1 << 20
"""Larger files of a folder are not used: many damaged copies are read in the time of one."""


def whole_images() -> list[bytes]:
    """Small images of every format, colour model, depth and coding."""
    y, x = np.mgrid[0:48, 0:60]
    rgb = np.stack([x * 4, y * 5, (x * y) % 256], -1).astype(np.uint8)
    rgba = np.concatenate([rgb, rgb[..., :1]], 2)
    grey16 = rgb[..., 2].astype(np.uint16) * 257
    found = [encoded(rgb, "JPEG", mode, **options) for mode in ("RGB", "L", "CMYK") for options in JPEG_OPTIONS]
    found += [simplejpeg.encode_jpeg(255 - np.asarray(Image.fromarray(rgb).convert("CMYK")), 90, "CMYK")]
    found += [jpeg_of(rgb[:12, :12, 2], *sampling, restart) for sampling in SAMPLINGS for restart in (0, 2)]
    found += [encoded(rgb, "PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    found += [encoded(rgb, "WEBP", mode, **options) for mode in ("RGB", "RGBA") for options in WEBP_OPTIONS]
    more = [Image.fromarray(255 - rgb)]
    found += [encoded(rgb, kind, save_all=True, append_images=more) for kind in ("PNG", "WEBP")]
    for picture in (Image.fromarray(grey16), Image.fromarray(rgba)):
        picture.save(out := io.BytesIO(), "PNG")
        found.append(out.getvalue())
    for depth, colours, samples in ((1, 0, 1), (2, 0, 1), (4, 0, 1), (16, 0, 1), (8, 2, 3), (16, 2, 3), (16, 6, 4)):
        rows = (b"\0" + rgb.tobytes()[: -(-60 * samples * depth // 8)]) * 48
        transparent = chunk(b"tRNS", bytes(2 * samples)) if samples < 4 else b""
        found.append(png_of(60, 48, rows, depth, colours, transparent))
    return found


JPEG_OPTIONS = ({}, {"progressive": True}, {"restart_marker_blocks": 2, "optimize": True}, {"subsampling": 0})
WEBP_OPTIONS = ({}, {"lossless": True}, {"quality": 10, "alpha_quality": 10})

# ------------------------------------------------------------------------------------------------ damage


def damaged(rng: random.Random, images: list[bytes]) -> bytes:
    """One image after one to three random changes. The checksums of a PNG are corrected in two of three."""
    data = bytearray(rng.choice(images))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(DAMAGE)(rng, data, images)
    if data.startswith(b"\x89PNG") and rng.random() < 0.66:
        _correct_checksums(data)
    return bytes(data)


def _position(rng: random.Random, data: bytes) -> int:
    """Often near the start, where the headers are."""
    return rng.randrange(min(len(data), rng.choice((64, 700, len(data)))) or 1)


def _flip_bits(rng: random.Random, data: bytearray, images: list[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        if data:
            data[_position(rng, data)] ^= 1 << rng.randrange(8)


def _cut(rng: random.Random, data: bytearray, images: list[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]
    if rng.random() < 0.5:
        data += rng.choice((b"\xff\xd9", chunk(b"IEND", b""), bytes(99)))


def _overwrite(rng: random.Random, data: bytearray, images: list[bytes]) -> None:
    start, length = _position(rng, data), rng.choice((1, 2, 4, 64))
    new = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    data[start : start + length] = new


def _move_segment(rng: random.Random, data: bytearray, images: list[bytes]) -> None:
    """Duplicate, remove or transplant a part between two borders of segments."""
    start, end = sorted(rng.choice(_borders(data)) for _ in range(2))
    part = bytes(data[start:end])
    if rng.random() < 0.5:
        del data[start:end]
    if rng.random() < 0.6:
        at = rng.choice(_borders(data))
        data[at:at] = part[:100_000]


def _splice(rng: random.Random, data: bytearray, images: list[bytes]) -> None:
    """The start of this file and the end of another."""
    other = rng.choice(images)
    del data[rng.choice(_borders(data)) :]
    data += other[rng.choice(_borders(other)) :]


def _change_size(rng: random.Random, data: bytearray, images: list[bytes]) -> None:
    """Other numbers where the header has width, height, depth, colour type, interlacing or sampling."""
    at = bytes(data).find(b"\xff\xc0") if data.startswith(b"\xff\xd8") else 0
    start, end = (at + 4, at + 19) if at > 0 else (16, 34)
    for _ in range(rng.choice((1, 2))):
        where = rng.randrange(start, end)
        value = rng.choice((rng.randrange(256), rng.choice((0, 1, 2, 3, 4, 8, 16, 17, 33, 34, 255))))
        data[where : where + 1] = bytes([value])


def _borders(data: bytes | bytearray) -> list[int]:
    """The end of the file, and offsets of JPEG markers, PNG chunks or RIFF chunks."""
    found = [len(data)]
    if data.startswith(b"\xff\xd8"):
        found += [i for i in range(2, min(len(data) - 1, 20_000)) if data[i] == 255 and data[i + 1] not in (0, 255)]
    at, size_at, byte_order = (8, 0, "big") if data.startswith(b"\x89PNG") else (12, 4, "little")
    while not data.startswith(b"\xff\xd8") and at + 8 <= len(data):
        found.append(at)
        size = int.from_bytes(data[at + size_at : at + size_at + 4], byte_order)
        at += size + 12 if byte_order == "big" else 8 + size + size % 2
    return found


def _correct_checksums(data: bytearray) -> None:
    for at in _borders(data)[1:]:
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 <= len(data):
            data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))


DAMAGE: list[Callable[[random.Random, bytearray, list[bytes]], None]] = [
    _flip_bits, _cut, _overwrite, _move_segment, _splice, _change_size,
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ decoding


def outcome(data: bytes) -> str:
    """ "read", or the reason why both pipelines refuse it. Raises `AssertionError` if they differ."""
    reasons = set()
    for pipeline in (pixels.FAST, pixels.REFERENCE):
        try:
            view = pixels.centre_view(data, 32, pipeline)
            assert view.shape == (32, 32, 3)
            assert view.dtype == np.uint8
            reasons.add("read")
        except ImageError as error:
            reasons.add(str(error))
    return " | ".join(sorted(reasons))


def main(seed: int, n: int, folders: list[str]) -> None:
    warnings.simplefilter("ignore")
    images = whole_images()
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*") if path.is_file()):
        if path.suffix in (".jpg", ".JPEG", ".png", ".webp") and path.stat().st_size <= MAX_FILE:
            images.append(path.read_bytes())
    for i in range(n):
        data = damaged(random.Random(seed * 1_000_000 + i), images)
        Path(f"damaged-{seed}").write_bytes(data)  # what remains after a crash
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        print(json.dumps(outcome(data)), flush=True)
    signal.setitimer(signal.ITIMER_PROF, 0)
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    print(json.dumps(int(peak) >> 10))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
