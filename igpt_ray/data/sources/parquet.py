"""Parquet files in Hugging Face's image schema: `image: struct<bytes, path>` and `label: int64`; or similar columns.

The image column is a struct with bytes, or binary. The label column holds integers or names, or is absent: then the
images have no labels. Both are recognised by their usual names; `--columns image=photo label=species` names others.

A unit is a range of row groups, or a whole file if there are too many files to open each of them while planning. Rows
are read in small batches by range reads: memory use is a page of the file and a few megabytes. A column chunk that
would decompress to many times its size is refused.

Class names come from Hugging Face's metadata, from `classes.txt` in the source, or, if there are few files, from the
labels themselves.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from igpt_ray import storage
from igpt_ray.data.sources.listing import LFS_POINTER, Listing, count_others
from igpt_ray.data.sources.ranges import LARGEST, RangeFile, ahead
from igpt_ray.data.sources.units import (
    MAX_BYTES,
    UNLABELLED,
    DraftUnit,
    Image,
    KeyFilter,
    Plan,
    Reading,
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

log = logging.getLogger(__name__)

MAX_OPENED = 4096
"""Most files whose footers are read while planning, to divide them into units of the requested size."""
MAX_SURVEYED = 64
"""Most files whose labels are read while planning, if the classes are not named."""
BATCH = 16
"""Rows per batch."""
THREADS = 16
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "class_id", "cls", "target", "category")
"""Usual column names, in the order of preference."""
MAX_EXPANSION, MAX_CHUNK = 20, 256 << 20
"""A column chunk of more than `MAX_CHUNK` bytes may have at most `MAX_EXPANSION` times its compressed size. Encoded
images hardly compress, so that a larger ratio is a decompression bomb."""


class Columns(NamedTuple):
    """Names of the columns that are read."""

    image: str
    label: str | None
    path: bool
    """Whether the image column has a path."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Row groups `first` to `last` (exclusive) of a file, or up to the end if `last` is None."""

    root: str
    path: str
    size: int
    split: str
    columns: Columns
    n_classes: int
    names: tuple[str, ...] | None
    """Class names, if the labels are names."""
    first: int = 0
    last: int | None = None

    def identity(self) -> object:
        usual = self.names is None and (self.columns.image, self.columns.label) == ("image", "label")
        chosen = () if usual else (self.columns.image, self.columns.label, self.names)
        return self.path, self.size, self.n_classes, self.first, self.last, *chosen

    def read(self, key_filter: KeyFilter | None) -> Reading:
        uri, columns = storage.join(self.root, self.path), self.columns
        index = {name: i for i, name in enumerate(self.names or ())}
        with _opened(uri, self.size) as file:
            groups = range(self.first, file.num_row_groups if self.last is None else self.last)
            for group in groups:
                _check_expansion(file.metadata.row_group(group), columns.image, uri)
            row = sum(file.metadata.row_group(i).num_rows for i in range(self.first))
            selected = [columns.image] + ([columns.label] if columns.label else [])
            for batch in ahead(file.iter_batches(BATCH, groups, selected, use_threads=False)):
                labels = batch[columns.label] if columns.label else [pa.scalar(None)] * len(batch)
                for image, label in zip(batch[columns.image], labels, strict=True):
                    yield from self._image(f"{self.path}/{row}", image, label.as_py(), index, key_filter)
                    row += 1
            return sum(file.metadata.row_group(i).num_rows for i in groups)

    def _image(
        self, row: str, image: Any, label: Any, index: dict[str, int], key_filter: KeyFilter | None
    ) -> Iterator[Image | UnreadableImage]:
        image = image.as_py()
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        key = key_of(path) if path else row
        if key_filter is not None and not key_filter(key):
            return
        where = f"{storage.join(self.root, row)} ({key})"
        label = _number(label, index, where)
        label = label_in(UNLABELLED if label is None else label, self.n_classes, where)
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
    columns: Columns
    classes: tuple[str, ...] | None


def plan_parquet(listing: Listing, images_per_unit: int, names: Mapping[str, str]) -> Plan:
    """Plan Parquet files; `names` are column names by role, image and label.

    Raises `SourceError` if a file is damaged or has other columns, or if the classes are unknown.
    """
    files = listing.named(".parquet")
    if not files:
        raise SourceError(f"{listing.source} holds no Parquet files")
    head = [storage.Entry(listing.uri(path), size) for path, size in files[: MAX_OPENED + 1]]
    opened = head if len(files) <= MAX_OPENED else head[:1]
    with ThreadPoolExecutor(THREADS) as pool:
        indexes = list(pool.map(partial(_index, names=names), opened))
    if len({(index.classes, index.columns) for index in indexes}) > 1:
        raise SourceError(f"the files of {listing.source} have different columns, or name different classes")
    columns = indexes[0].columns
    classes, by_name = indexes[0].classes or (), False
    if columns.label is None:
        log.warning("%s has no label column: images are read without labels, see --columns", listing.source)
    elif not classes:
        classes, by_name = _survey(listing, head, columns)
    drafts: Iterable[DraftUnit]
    rows = partial(Rows, listing.root, columns=columns, n_classes=len(classes), names=classes if by_name else None)
    if len(opened) == len(files):
        drafts = chain.from_iterable(
            _runs(listing, entry, index.rows, rows, images_per_unit) for entry, index in zip(head, indexes, strict=True)
        )
    else:
        bytes_per_image = files[0].size / max(1, sum(indexes[0].rows))
        drafts = whole_files(files, bytes_per_image, lambda path, size, split: rows(path=path, size=size, split=split))
    others = count_others(listing.files, lambda path: path.lower().endswith(".parquet") or path == "classes.txt")
    return Plan(classes, numbered(drafts), others)


def _runs(
    listing: Listing, entry: storage.Entry, rows: tuple[int, ...], content: Callable[..., Rows], images_per_unit: int
) -> Iterator[DraftUnit]:
    """Consecutive row groups with at least `images_per_unit` rows; the last unit may be smaller."""
    path = listing.path(entry)
    split, first, images = split_of(path), 0, 0
    for i, group_rows in enumerate(rows, 1):
        images += group_rows
        if images and (images >= images_per_unit or i == len(rows)):
            yield DraftUnit(split, images, content(path=path, size=entry.size, split=split, first=first, last=i))
            first, images = i, 0


def _index(entry: storage.Entry, names: Mapping[str, str]) -> Index:
    with _opened(*entry) as file:
        rows = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        columns = _columns(file.schema_arrow, names, entry.uri)
        metadata = (file.schema_arrow.metadata or {}).get(b"huggingface")
        return Index(rows, columns, _classes(metadata, columns.label, entry.uri) if metadata else None)


def _columns(schema: pa.Schema, names: Mapping[str, str], uri: str) -> Columns:
    """The image and label columns, by the given names or else by the usual ones."""
    types = {field.name: field.type for field in schema}
    held = f"{uri} has the columns {', '.join(f'{name}: {type_}' for name, type_ in types.items())}"
    if unknown := sorted(set(names.values()) - types.keys()):
        raise SourceError(f"{held}, but --columns names {unknown[0]!r}")
    usual = [name for name in IMAGE_COLUMNS if name in types and _holds_images(types[name])]
    others = [name for name, type_ in types.items() if _holds_images(type_)]
    image = names.get("image") or (usual[0] if usual else others[0] if len(others) == 1 else None)
    if image is None or not _holds_images(types[image]):
        raise SourceError(
            f"{held}: expected an image column of struct<bytes: binary, path: string> or binary, such as `image`; name"
            " another with --columns image=NAME"
        )
    labels = [name for name in LABEL_COLUMNS if name in types and _holds_labels(types[name])]
    label = names.get("label") or (labels[0] if labels else None)
    if label is not None and not _holds_labels(types[label]):
        raise SourceError(f"{held}: the label column {label!r} must hold integers or names")
    inner = types[image]
    return Columns(image, label, pa.types.is_struct(inner) and _is_text(_inner(inner).get("path", pa.null())))


def _inner(struct: pa.DataType) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in struct}


def _holds_images(kind: pa.DataType) -> bool:
    return _is_binary(_inner(kind).get("bytes", pa.null()) if pa.types.is_struct(kind) else kind)


def _holds_labels(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(is_kind(value) for is_kind in (pa.types.is_integer, pa.types.is_floating, _is_text, pa.types.is_boolean))


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _number(label: Any, index: dict[str, int], where: str) -> int | None:
    """The class number of a value of the label column; None if it is null."""
    if label is None or label != label:  # NaN, as pandas writes missing integers
        return None
    if isinstance(label, str) or index:
        if str(label) not in index:
            raise SourceError(f"{where} has the label {label!r}, which is not one of the {len(index)} classes")
        return index[str(label)]
    if label != int(label):
        raise SourceError(f"{where} has the label {label}: expected a whole number or a name")
    return int(label)


def _classes(metadata: bytes, label: str | None, uri: str) -> tuple[str, ...] | None:
    """The class names in Hugging Face's metadata; None if it does not name them."""
    try:
        features = json.loads(metadata)["info"]["features"]
        names = features.get(label, {}).get("names")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{uri} has Hugging Face metadata that does not describe its columns: {error!r}") from error
    return tuple(map(str, names)) if names else None


def _survey(listing: Listing, files: list[storage.Entry], columns: Columns) -> tuple[tuple[str, ...], bool]:
    """The classes, and whether labels are names: from `classes.txt`, or else from all labels.

    Only the columns of labels and paths are fetched.
    """
    stated = stated_classes(listing.root)
    numbers: dict[int, str] = {}
    words: set[str] = set()
    for i, entry in enumerate(files):
        for key, label in _labels(entry, columns):
            if isinstance(label, str):
                words.add(label)
            else:
                observe(numbers, _number(label, {}, entry.uri), key)
        if stated:
            return stated, bool(words)
        if (words or numbers) and i == 0 and len(files) > MAX_SURVEYED:
            raise unnamed_classes(listing.source, MAX_SURVEYED, "files")
        if i == MAX_SURVEYED:
            break  # a source without labels
    return (tuple(sorted(words)), True) if words else (observed_classes(numbers), False)


def _labels(entry: storage.Entry, columns: Columns) -> Iterator[tuple[str, Any]]:
    """Key and label of every row."""
    assert columns.label is not None
    chosen = [columns.label] + ([f"{columns.image}.path"] if columns.path else [])
    with _opened(*entry) as file:
        for batch in file.iter_batches(1000, columns=chosen, use_threads=False):
            paths = batch[columns.image].field("path").to_pylist() if columns.path else [None] * len(batch)
            for path, label in zip(paths, batch[columns.label].to_pylist(), strict=True):
                yield key_of(path or ""), label


def _check_expansion(group: pq.RowGroupMetaData, image: str, uri: str) -> None:
    for column in (group.column(i) for i in range(group.num_columns)):
        stored, expanded = column.total_compressed_size, column.total_uncompressed_size
        if column.path_in_schema.split(".")[0] == image and expanded > max(MAX_CHUNK, MAX_EXPANSION * stored):
            raise SourceError(
                f"{uri}: {stored} bytes of the column {image} would decompress to {expanded}, more than"
                f" {MAX_EXPANSION} times as many: images hardly compress, so the file is malformed"
            )


@contextmanager
def _opened(uri: str, size: int) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file. Errors of pyarrow are raised as `SourceError`."""
    source = RangeFile(uri, size)
    try:
        # Without pre_buffer=False, pyarrow fetches the whole column of a row group, which may be the whole file.
        options = {"buffer_size": LARGEST, "pre_buffer": False, "arrow_extensions_enabled": False}
        with pq.ParquetFile(pa.PythonFile(source, "r"), page_checksum_verification=True, **options) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        source.seek(0)
        if source.read(len(LFS_POINTER)) == LFS_POINTER:
            raise SourceError(f"{uri} is a Git LFS pointer instead of the file: run `git lfs pull`") from error
        raise SourceError(f"{uri} is damaged or not a Parquet file: {' '.join(str(error).split())}") from error
