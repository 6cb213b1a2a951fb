"""Structure of a JPEG: its segments and frame, checks before decoding, and copies without irrelevant parts.

Markers and segments are those of ITU T.81, annex B.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from igpt_ray.errors import ImageError

MAX_SCANS = 256
"""Most scans of a JPEG; encoders write about ten."""
MAX_SCANNED = 1 << 32
"""Most pixels times scans: a few seconds of an attack with empty scans, or 64 scans of 67 megapixels."""
MAX_SEGMENTS = 1 << 16
"""Most segments of a JPEG: each takes memory, while an empty one has four bytes."""
FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
"""Frame markers of baseline, extended sequential and progressive JPEGs, the last two of them with arithmetic coding."""
SEQUENTIAL = {0xC0, 0xC1, 0xC9}
LOSSLESS = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}
"""Frame markers of lossless and hierarchical JPEGs (ITU T.81, table B.1). libjpeg-turbo writes out of bounds when it
decodes a lossless JPEG at a reduced scale."""
START_OF_SCAN = 0xDA
MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
"""A marker, but not a restart marker or a stuffed byte of pixel data."""
RESTART = re.compile(rb"\xff[\xd0-\xd7]")
JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
ADOBE = 0xEE


class Frame(NamedTuple):
    """The frame header, and what the first scan shows."""

    width: int
    height: int
    components: int
    sequential: bool
    stored: float
    """Coefficients per pixel that a decoder stores until the last scan: 0 if one scan holds all components."""


def frame_of(data: bytes) -> Frame:
    """The frame. Raises `ImageError` if it is missing, truncated, lossless or hierarchical, or has too many scans."""
    frame, n_scans = None, 0
    for marker, at in segments(data):
        if marker in LOSSLESS:
            raise ImageError("a lossless or hierarchical JPEG is not supported: convert it to PNG")
        if marker in FRAMES and not n_scans:
            frame = _parsed_frame(data, marker, at)
        elif marker == START_OF_SCAN and frame:
            n_scans += 1
            if frame.sequential and data[at + 2 : at + 3] == bytes([frame.components]):
                return frame._replace(stored=0)
            # A few kilobytes can hold thousands of empty scans, each of which costs a pass over the image.
            limit = min(MAX_SCANS, MAX_SCANNED // max(1, frame.width * frame.height))
            if n_scans > limit:
                raise ImageError(f"a JPEG of more than {limit} scans")
    if not frame or not n_scans:
        raise ImageError("damaged JPEG: its frame or its first scan is missing")
    return frame


def _parsed_frame(data: bytes, marker: int, at: int) -> Frame:
    height, width = (int.from_bytes(data[at + k : at + k + 2], "big") for k in (3, 5))
    factors = [(hv >> 4, hv & 15) for hv in data[at + 9 : at + int.from_bytes(data[at : at + 2], "big") : 3]]
    if len(factors) != int.from_bytes(data[at + 7 : at + 8], "big") or not all(h and v for h, v in factors):
        raise ImageError("damaged JPEG: its frame header is damaged")
    across, down = (max((factor[k] for factor in factors), default=1) for k in (0, 1))
    stored = sum(h * v for h, v in factors) / (across * down)
    return Frame(width, height, len(factors), marker in SEQUENTIAL, stored)


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, offset of the segment's length) up to the end of the image; other bytes in between are skipped."""
    at, n = 2, 0
    while (found := MARKER.search(data, at)) and found[1] != b"\xd9":
        if (n := n + 1) > MAX_SEGMENTS:
            raise ImageError(f"a JPEG of more than {MAX_SEGMENTS} segments")
        yield found[1][0], found.end()
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")


def cleaned(data: bytes, padding: bytes = b"") -> bytes:
    """The file without stray bytes between segments and without metadata, whose damage does not matter.

    Kept are tables, frames and scans, and the two application segments that determine the colour space: JFIF (replaced
    by version 1.1) and Adobe's. The spectral parameters of sequential scans, which decoders ignore, are corrected.
    `padding` is added after every restart interval of every scan, and in eight more intervals after the last.
    """
    parts, sequential, end = [data[:2]], False, 2
    for marker, at in segments(data):
        end = at + int.from_bytes(data[at : at + 2], "big")
        segment = data[at - 2 : end]
        if marker == 0xE0:
            segment = JFIF if segment[4:9] == b"JFIF\0" and len(segment) >= len(JFIF) else b""
        elif 0xE0 <= marker <= 0xFE and marker != ADOBE:
            segment = b""
        elif marker == START_OF_SCAN:
            following = MARKER.search(data, end)
            pixels = data[end : following.start() if following else len(data)]
            if padding:
                more = b"".join(padding + b"\xff" + bytes([restart]) for restart in range(0xD0, 0xD8))
                pixels = RESTART.sub(lambda found: padding + found[0], pixels) + more + padding
            segment = (segment[:-3] + b"\0\x3f\0" if sequential else segment) + pixels
        sequential = sequential or marker in SEQUENTIAL
        parts.append(segment)
    return b"".join(parts) + (b"\xff\xd9" if MARKER.search(data, end) else b"")
