"""Images in single files: class folders as in torchvision, and ImageNet in Kaggle's layout.

    folders   <class>/<image>, or {train,val,test}/<class>/<image>
    kaggle    ILSVRC/Data/CLS-LOC/{train/<wnid>/<image>, val/<image>, test/<image>}, LOC_val_solution.csv

The plan holds the name of every file, which suits millions of images but not billions.
"""

import csv
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from igpt_ray import storage
from igpt_ray.data.sources.ranges import fetched
from igpt_ray.data.sources.units import (
    MAX_BYTES,
    SPLITS,
    TEST,
    TRAIN,
    UNLABELLED,
    VAL,
    DraftUnit,
    Image,
    KeyFilter,
    Plan,
    UnreadableImage,
    batched,
    key_of,
    numbered,
)
from igpt_ray.errors import NotFound, SourceError

log = logging.getLogger(__name__)

READ_AHEAD = 16
"""Concurrent requests per unit, to hide the latency of the object store."""
READ_AHEAD_DISK = 2
"""The same for local disks, whose latency is low: more threads would cost three times as much as the reads."""
FILES_PER_FETCH = 4
"""Files that a thread fetches in one call, because a call per file costs as much as reading the file."""

Listing = list[tuple[str, int]]
"""Path relative to the split, and size in bytes."""


@dataclass(frozen=True, slots=True)
class Files:
    """Images in files of their own."""

    root: str
    """URI that the paths are relative to."""
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    labels: tuple[int, ...]

    def identity(self) -> object:
        return tuple(zip(self.paths, self.sizes, strict=True)), self.labels

    def read(self, key_filter: KeyFilter | None) -> Iterator[Image | UnreadableImage]:
        """Raises `StorageError` if a file cannot be fetched."""
        items = [(path, key_of(path), label) for path, label in zip(self.paths, self.labels, strict=True)]
        items = [item for item in items if key_filter is None or key_filter(item[1])]
        ahead = READ_AHEAD if storage.is_remote(self.root) else READ_AHEAD_DISK
        for part in fetched(batched(items, FILES_PER_FETCH), self._fetch, ahead):
            yield from part

    def _fetch(self, items: tuple[tuple[str, str, int], ...]) -> list[Image | UnreadableImage]:
        images: list[Image | UnreadableImage] = []
        for path, key, label in items:
            data = storage.read(storage.join(self.root, path), 0, MAX_BYTES + 1)
            complete = len(data) <= MAX_BYTES
            images.append(
                Image(key, label, data) if complete else UnreadableImage(key, f"has more than {MAX_BYTES} bytes")
            )
        return images


def plan_folders(source: str, images_per_unit: int) -> Plan:
    """Plan class folders. Raises `SourceError` if the source is empty, or a file is not in a class folder."""
    files, nested = _by_split(source)
    classes = {split: {_class_of(path) for path, _ in listing} for split, listing in files.items()}
    names = tuple(sorted(set().union(*classes.values())))
    index = {name: i for i, name in enumerate(names)}
    if new := set(names) - classes.get(TRAIN, set(names)):
        log.warning("%d of %d classes have no training image: %s", len(new), len(names), ", ".join(sorted(new)[:5]))
    drafts: list[DraftUnit] = []
    for split, listing in files.items():
        root = storage.join(source, split) if nested else source
        drafts += _cut(split, root, listing, lambda path: index[_class_of(path)], images_per_unit)
    return Plan(names, numbered(drafts))


def plan_kaggle(source: str, images_per_unit: int) -> Plan:
    """Plan Kaggle's ImageNet; test images are unlabelled. Raises `SourceError` if a validation image has no CSV row."""
    images = storage.join(source, "ILSVRC/Data/CLS-LOC")
    files: dict[str, Listing] = defaultdict(list)
    for entry in storage.walk(images):
        split, slash, path = storage.relative_to(images, entry.uri).partition("/")
        if split not in SPLITS or not slash or ("/" in path) != (split == TRAIN):
            raise SourceError(f"{entry.uri} does not belong to Kaggle's layout: train/<wnid>/<image>, val/<image>")
        files[split].append((path, entry.size))
    if not files:
        raise SourceError(f"{images} holds no files: expected the unpacked archive of Kaggle's ImageNet")
    validated = _solution(storage.join(source, "LOC_val_solution.csv"), files[VAL])
    classes = tuple(sorted({_class_of(path) for path, _ in files[TRAIN]} | set(validated.values())))
    index = {name: i for i, name in enumerate(classes)}
    label_of = {
        TRAIN: lambda path: index[_class_of(path)],
        VAL: lambda path: index[validated[path]],
        TEST: lambda path: UNLABELLED,
    }
    drafts: list[DraftUnit] = []
    for split, listing in files.items():
        drafts += _cut(split, storage.join(images, split), listing, label_of[split], images_per_unit)
    return Plan(classes, numbered(drafts))


def _solution(uri: str, listing: Listing) -> dict[str, str]:
    """Validation image -> WordNet id, from lines such as `ILSVRC2012_val_00000001,n03995372 85 1 499 272 ...`."""
    if not listing:
        return {}
    try:
        text = storage.read(uri).decode()
    except (NotFound, UnicodeDecodeError) as error:
        raise SourceError(f"{uri} is needed for the labels of {len(listing)} validation images: {error}") from error
    boxes = {row[0]: row[1].split() for row in csv.reader(text.splitlines()) if len(row) == 2}
    labels = {path: boxes.get(path.rpartition(".")[0]) for path, _ in listing}
    if missing := sorted(path for path, words in labels.items() if not words):
        raise SourceError(f"{uri} has no label for {len(missing)} validation images, such as {', '.join(missing[:3])}")
    return {path: words[0] for path, words in labels.items() if words}


def _cut(split: str, root: str, listing: Listing, label_of: Callable[[str], int], n: int) -> Iterator[DraftUnit]:
    """Units of n images, sorted by path."""
    for part in batched(sorted(listing), n):
        paths, sizes = tuple(path for path, _ in part), tuple(size for _, size in part)
        yield DraftUnit(split, len(part), Files(root, paths, sizes, tuple(label_of(path) for path in paths)))


def _by_split(source: str) -> tuple[dict[str, Listing], bool]:
    """Split -> files, and whether the top folders are splits; if not, all files belong to the training split."""
    layout = f"{source}/<class>/<image>, or {source}/{{{','.join(SPLITS)}}}/<class>/<image>"
    listing = [(storage.relative_to(source, entry.uri), entry.size) for entry in storage.walk(source)]
    if not listing:
        raise SourceError(f"{source} holds no files: expected images in class folders, {layout}")
    tops = {path.partition("/")[0] for path, _ in listing}
    nested = not tops.isdisjoint(SPLITS)
    if nested and not tops <= set(SPLITS):
        mixed = ", ".join(sorted(tops - set(SPLITS))[:5])
        raise SourceError(f"{source} holds other entries next to the split folders ({mixed}): expected {layout}")
    files: dict[str, Listing] = defaultdict(list)
    for path, size in listing:
        split, _, inside = path.partition("/") if nested else (TRAIN, "", path)
        if "/" not in inside:
            raise SourceError(f"{storage.join(source, path)} is not in a class folder: expected {layout}")
        files[split].append((inside, size))
    return files, nested


def _class_of(path: str) -> str:
    return path.partition("/")[0]
