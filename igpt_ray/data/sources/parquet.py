"""Parquet files in Hugging Face's image schema: `image: struct<bytes, path>` and `label: int64`.

A unit is a range of row groups, or a whole file if there are too many files to open each of them while planning. Rows
are read in small batches by range reads: memory use is a page of the file and a few megabytes.

Class names come from Hugging Face's metadata, from `classes.txt` in the source, or, if there are few files, from the
labels themselves.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from igpt_ray import storage
from igpt_ray.data.sources.ranges import LARGEST, RangeFile, ahead
from igpt_ray.data.sources.units import (
    MAX_BYTES,
    UNLABELLED,
    DraftUnit,
    Image,
    KeyFilter,
    Plan,
    UnreadableImage,
    key_of,
    label_in,
    numbered,
    observe,
    observed_classes,
    split_of,
    stated_classes,
    unnamed_classes,
    whole_files,
)
from igpt_ray.errors import SourceError

MAX_OPENED = 4096
"""Most files whose footers are read while planning, to divide them into units of the requested size."""
MAX_SURVEYED = 64
"""Most files whose labels are read while planning, if the classes are not named."""
BATCH = 16
"""Rows per batch."""
THREADS = 16
BINARY = (pa.binary(), pa.large_binary())
TEXT = (pa.string(), pa.large_string())


@dataclass(frozen=True, slots=True)
class Rows:
    """Row groups `first` to `last` (exclusive) of a file, or up to the end if `last` is None."""

    root: str
    path: str
    size: int
    split: str
    n_classes: int
    first: int = 0
    last: int | None = None

    def identity(self) -> object:
        return self.path, self.size, self.n_classes, self.first, self.last

    def read(self, key_filter: KeyFilter | None) -> Iterator[Image | UnreadableImage]:
        uri = storage.join(self.root, self.path)
        with _opened(uri, self.size) as file:
            groups = range(self.first, file.num_row_groups if self.last is None else self.last)
            row = sum(file.metadata.row_group(i).num_rows for i in range(self.first))
            for batch in ahead(file.iter_batches(BATCH, groups, ["image", "label"], use_threads=False)):
                for image, label in zip(batch["image"], batch["label"], strict=True):
                    yield from self._image(f"{self.path}/{row}", image, label.as_py(), key_filter)
                    row += 1

    def _image(
        self, row: str, image: Any, label: int | None, key_filter: KeyFilter | None
    ) -> Iterator[Image | UnreadableImage]:
        path = image["path"].as_py() if image.is_valid else None
        key = key_of(path) if path else row
        if key_filter is not None and not key_filter(key):
            return
        where = f"{storage.join(self.root, row)} ({key})"
        label = label_in(UNLABELLED if label is None else label, self.n_classes, self.split, where)
        data = image["bytes"].as_py() if image.is_valid else None
        if data is None:
            yield UnreadableImage(key, f"has no bytes in row {row}")
        elif len(data) > MAX_BYTES:
            yield UnreadableImage(key, f"has {len(data)} bytes, more than {MAX_BYTES}")
        else:
            yield Image(key, label, data)


class Index(NamedTuple):
    """The contents of a file's footer."""

    rows: tuple[int, ...]
    """Number of rows of each row group."""
    classes: tuple[str, ...] | None


def plan_parquet(source: str, images_per_unit: int) -> Plan:
    """Raises `SourceError` if a file is damaged or has other columns, or if the classes are unknown."""
    listing = (entry for entry in storage.walk(source) if entry.uri.lower().endswith(".parquet"))
    head = list(islice(listing, MAX_OPENED + 1))
    if not head:
        raise SourceError(f"{source} holds no Parquet files")
    with ThreadPoolExecutor(THREADS) as pool:
        indexes = list(pool.map(_index, head[:1] if len(head) > MAX_OPENED else head))
    if len({index.classes for index in indexes}) > 1:
        raise SourceError(f"the files of {source} name different classes in their metadata")
    classes = indexes[0].classes or stated_classes(source) or _survey(source, head)
    if len(head) <= MAX_OPENED:
        drafts: Iterable[DraftUnit] = chain.from_iterable(
            _runs(source, entry, index.rows, len(classes), images_per_unit)
            for entry, index in zip(head, indexes, strict=True)
        )
    else:
        bytes_per_image = head[0].size / max(1, sum(indexes[0].rows))

        def rows(path: str, size: int, split: str) -> Rows:
            return Rows(source, path, size, split, len(classes))

        drafts = whole_files(source, chain(head, listing), bytes_per_image, rows)
    return Plan(classes, numbered(drafts))


def _runs(
    source: str, entry: storage.Entry, rows: tuple[int, ...], n: int, images_per_unit: int
) -> Iterator[DraftUnit]:
    """Consecutive row groups with at least `images_per_unit` rows; the last unit may be smaller."""
    path = storage.relative_to(source, entry.uri)
    split, first, images = split_of(path), 0, 0
    for i, group_rows in enumerate(rows, 1):
        images += group_rows
        if images and (images >= images_per_unit or i == len(rows)):
            yield DraftUnit(split, images, Rows(source, path, entry.size, split, n, first, i))
            first, images = i, 0


def _index(entry: storage.Entry) -> Index:
    with _opened(*entry) as file:
        rows = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        metadata = (file.schema_arrow.metadata or {}).get(b"huggingface")
        return Index(rows, _names(metadata, entry.uri) if metadata else None)


def _names(metadata: bytes, uri: str) -> tuple[str, ...] | None:
    try:
        label = json.loads(metadata)["info"]["features"]["label"]
        names = label.get("names")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{uri} has Hugging Face metadata that does not describe its label: {error!r}") from error
    return tuple(map(str, names)) if names else None


def _survey(source: str, head: list[storage.Entry]) -> tuple[str, ...]:
    """The classes, from all labels. Only the columns of labels and paths are fetched."""
    if len(head) > MAX_SURVEYED:
        raise unnamed_classes(source, MAX_SURVEYED, "files")
    seen: dict[int, str] = {}
    for entry in head:
        with _opened(*entry) as file:
            for batch in file.iter_batches(1000, columns=["image.path", "label"], use_threads=False):
                for path, label in zip(
                    batch["image"].field("path").to_pylist(), batch["label"].to_pylist(), strict=True
                ):
                    observe(seen, label, key_of(path or ""))
    return observed_classes(seen)


@contextmanager
def _opened(uri: str, size: int) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file and check its schema. Errors of pyarrow are raised as `SourceError`."""
    try:
        source = pa.PythonFile(RangeFile(uri, size), "r")
        # Without pre_buffer=False, pyarrow fetches the whole column of a row group, which may be the whole file.
        options = {"buffer_size": LARGEST, "pre_buffer": False, "arrow_extensions_enabled": False}
        with pq.ParquetFile(source, page_checksum_verification=True, **options) as file:
            _check(file.schema_arrow, uri)
            yield file
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{uri} is damaged or not a Parquet file: {' '.join(str(error).split())}") from error


def _check(schema: pa.Schema, uri: str) -> None:
    image = schema.field("image").type if "image" in schema.names else pa.null()
    label = schema.field("label").type if "label" in schema.names else pa.null()
    inner = {field.name: field.type for field in image} if pa.types.is_struct(image) else {}
    data, path = inner.get("bytes", pa.null()), inner.get("path", pa.null())
    if not pa.types.is_integer(label) or data not in BINARY or path not in TEXT:
        raise SourceError(
            f"{uri} has the columns {', '.join(f'{field.name}: {field.type}' for field in schema)}: expected"
            " image: struct<bytes: binary, path: string> and label: int64"
        )
