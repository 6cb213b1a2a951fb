"""Every image of a folder that PIL reads: read with PIL's pixels, or refused for a stated reason.

The folders are the test suites of decoders, for example `Tests/images` of Pillow, `testimages` of libjpeg-turbo and
`test/data` of wuffs. A child process decodes, so that a crash costs one file. PIL's pixels are composited on white, and
the upper 8 bits of 16 are used, as in `decode`; the EXIF orientation is not applied.
"""

import io
import re
import sys
import warnings
from collections import Counter, defaultdict
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from igpt_ray.data import pixels
from igpt_ray.data.image_files import RGB, decode
from igpt_ray.errors import ImageError
from igpt_ray.settings import Section

PSNR_DB = 40.0
"""Least similarity of a lossy image that is decoded by another library than PIL's."""

TIMEOUT_S = 60


class BenchCorpusConfig(Section):
    """Compare the pixels of all images in folders with PIL's."""

    images: tuple[Path, ...]
    """Folders of images."""


class Outcome(NamedTuple):
    verdict: str
    """equal, close, differs, refused, refused by PIL too, read but refused by PIL, crashed."""
    format: str
    reason: str


def corpus(settings: BenchCorpusConfig) -> dict[str, Any]:
    """Return the number of files by verdict and format, and the files that differ or are refused, by reason.

    Prints the table of refused files to stderr.
    """
    child = Child()
    counts: Counter[str] = Counter()
    files = defaultdict(list)
    for path in sorted(path for folder in settings.images for path in folder.rglob("*") if path.is_file()):
        outcome = child.examined(path)
        counts[f"{outcome.verdict}: {outcome.format}"] += 1
        if outcome.verdict not in ("equal", "close", "refused by PIL too"):
            files[outcome.verdict, outcome.format, re.sub(r"\d+", "n", outcome.reason)].append(path.name)
    for (verdict, format, reason), names in sorted(files.items()):
        print(f"{verdict:25} {format:6} {len(names):4}  {reason}: {', '.join(names[:4])}", file=sys.stderr)
    return {"files": counts.total(), "verdicts": dict(sorted(counts.items()))}


class Child:
    """A process that examines files. It is replaced when it crashes or takes longer than TIMEOUT_S."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.pipe, other = Pipe()
        self.process = Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def examined(self, path: Path) -> Outcome:
        self.pipe.send(path)
        try:
            if self.pipe.poll(TIMEOUT_S):
                return self.pipe.recv()
            reason = f"more than {TIMEOUT_S} s"
        except EOFError:
            reason = "the process died"
        self.process.kill()
        self.start()
        return Outcome("crashed", path.suffix, reason)


def _serve(pipe: Connection) -> None:
    while True:
        pipe.send(examined(pipe.recv()))


def examined(path: Path) -> Outcome:
    """Decode a file with PIL and with both pixel pipelines."""
    warnings.simplefilter("ignore")
    data = path.read_bytes()
    format, expected = _decoded_by_pil(data)
    try:
        rgb, reason = decode(data), ""
        for pipeline in (pixels.FAST, pixels.REFERENCE):
            pixels.centre_view(data, 32, pipeline)
    except ImageError as error:
        rgb, reason = None, str(error).split("(starts with")[0]
    if expected is None:
        return Outcome("refused by PIL too" if rgb is None else "read but refused by PIL", format, reason)
    if rgb is None:
        return Outcome("refused", format, reason)
    if rgb.shape != expected.shape:
        return Outcome("differs", format, f"{rgb.shape} and {expected.shape}")
    if np.array_equal(rgb, expected):
        return Outcome("equal", format, "")
    squared = np.square(rgb.astype(np.float32) - expected).mean()
    close = format == "JPEG" and 10 * np.log10(255**2 / squared) > PSNR_DB
    return Outcome("close" if close else "differs", format, "" if close else "pixels differ")


def _decoded_by_pil(data: bytes) -> tuple[str, RGB | None]:
    """The format, and RGB on white; None if PIL refuses the file."""
    format = "unknown"
    try:
        with Image.open(io.BytesIO(data)) as picture:
            format = str(picture.format)
            picture.load()
            if picture.mode.startswith("I"):
                return format, (np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8)[..., None].repeat(3, 2)
            rgba = np.asarray(picture.convert("RGBA")).astype(float)
    except Exception:  # PIL raises many types
        return format, None
    alpha = rgba[..., 3:] / 255
    return format, np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
