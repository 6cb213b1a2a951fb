"""The binary version of CIFAR-10 and CIFAR-100, https://www.cs.toronto.edu/~kriz/cifar.html.

    CIFAR-10    data_batch_1.bin ... data_batch_5.bin, test_batch.bin, batches.meta.txt
    CIFAR-100   train.bin, test.bin, fine_label_names.txt

A record is the label (CIFAR-100: the coarse and the fine label), then 32 x 32 bytes of red, of green and of blue. The
key of an image is its file and record, as in `data_batch_1/00042`. An image is passed on as a PNG of its pixels.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image as Picture

from igpt_ray import storage
from igpt_ray.data.sources.listing import Listing, count_others
from igpt_ray.data.sources.ranges import Window
from igpt_ray.data.sources.units import (
    TEST,
    TRAIN,
    DraftUnit,
    Image,
    KeyFilter,
    Plan,
    Reading,
    label_in,
    numbered,
)
from igpt_ray.errors import NotFound, SourceError

SIDE = 32
PIXELS = 3 * SIDE * SIDE
BINARY = re.compile(r"(?:.*/)?(data_batch_\d|test_batch|train|test)\.bin", re.IGNORECASE)
PICKLES = re.compile(r"(?:.*/)?(data_batch_\d|test_batch|batches\.meta)", re.IGNORECASE)
NAMES = {1: "batches.meta.txt", 2: "fine_label_names.txt"}
"""File of the class names, by the number of label bytes of a record."""


@dataclass(frozen=True, slots=True)
class Records:
    """Records `first` to `last` (exclusive) of a file."""

    root: str
    path: str
    size: int
    split: str
    label_bytes: int
    n_classes: int
    first: int
    last: int

    def identity(self) -> object:
        return self.path, self.size, self.n_classes, self.first, self.last

    def read(self, key_filter: KeyFilter | None) -> Reading:
        length, stem = self.label_bytes + PIXELS, storage.name(self.path).rpartition(".")[0]
        with Window(storage.join(self.root, self.path), self.size) as window:
            for i in range(self.first, self.last):
                key = f"{stem}/{i:05d}"
                if key_filter is not None and not key_filter(key):
                    continue
                record = window.read_all(i * length, length)
                label = label_in(record[self.label_bytes - 1], self.n_classes, f"{window.uri}: record {i}")
                planes = np.frombuffer(record, np.uint8, offset=self.label_bytes).reshape(3, SIDE, SIDE)
                out = io.BytesIO()
                Picture.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))).save(out, "PNG", compress_level=1)
                yield Image(key, label, out.getvalue())
        return self.last - self.first


def is_cifar(listing: Listing) -> bool:
    """Whether the source is CIFAR's binary version. Raises `SourceError` if it is the Python version."""
    names = [path for path, _ in listing.files]
    if any(BINARY.fullmatch(name) for name in names):
        return True
    if any(PICKLES.fullmatch(name) for name in names):
        raise SourceError(
            f"{listing.source} holds CIFAR's Python version, whose pickles can run code and are not read: download the"
            " binary version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz) instead, or use Hugging Face's Parquet"
        )
    return False


def plan_cifar(listing: Listing, images_per_unit: int) -> Plan:
    """Raises `SourceError` if a file has an incomplete record, or the class names are missing."""
    files = [file for file in listing.files if BINARY.fullmatch(file.path)]
    if not files:
        raise SourceError(f"{listing.source} holds no data_batch_1.bin (CIFAR-10) or train.bin (CIFAR-100)")
    label_bytes = 1 if "batch" in storage.name(files[0].path) else 2
    length = label_bytes + PIXELS
    folder = files[0].path.rpartition("/")[0]
    classes = _class_names(listing.uri("/".join(filter(None, [folder, NAMES[label_bytes]]))))
    drafts: list[DraftUnit] = []
    for path, size in files:
        if size % length:
            raise SourceError(f"{listing.uri(path)} has {size} bytes, not a multiple of {length}: it is cut")
        split = TEST if storage.name(path).lower().startswith("test") else TRAIN
        for first, last in _ranges(size // length, images_per_unit):
            content = Records(listing.root, path, size, split, label_bytes, len(classes), first, last)
            drafts.append(DraftUnit(split, last - first, content))
    used = {path for path, _ in files}
    return Plan(classes, numbered(drafts), count_others(listing.files, lambda path: path in used))


def _ranges(n: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, n)) for first in range(0, n, step))


def _class_names(uri: str) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in storage.read(uri).decode("utf-8-sig").splitlines() if line.strip())
    except (NotFound, UnicodeDecodeError) as error:
        raise SourceError(f"{uri} is needed for the class names: {error}") from error
    return names
