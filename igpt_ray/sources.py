"""Sources: a folder or bucket of images -> units of work -> (key, label, bytes).

Class folders, as torchvision has them: `<class>/<image>`, or `train/<class>/<image>` beside other splits. The plan is
a function of the listing alone: classes sorted by name, images sorted by key, cut into units of a fixed size.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

from igpt_ray import storage
from igpt_ray.errors import SourceError

SPLITS = ("train", "val", "test")
TRAIN = "train"
READ_AHEAD = 16
"""Small files fetched at once per unit, to hide the object store's latency."""


class Image(NamedTuple):
    """One encoded picture."""

    key: str
    """Path below the split: unique in it."""
    label: int
    """Index into the classes."""
    data: bytes


@dataclass(frozen=True)
class Unit:
    """What one task turns into one shard."""

    name: str
    """`00000`, `00001` ... within the split."""
    split: str
    root: str
    """URI below which the keys lie."""
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    digest: str
    """sha256 of keys, labels and sizes in bytes: another listing is another unit."""


@dataclass(frozen=True)
class Plan:
    classes: tuple[str, ...]
    units: tuple[Unit, ...]


def plan(source: str, images_per_unit: int) -> Plan:
    """List `source` and cut every split into units.

    Raises `SourceError` if it is empty, if a file lies outside any class folder, or if another split has classes that
    the training split lacks.
    """
    files, nested = _by_split(source)
    classes = sorted({_class_of(key) for key, _ in files.get(TRAIN) or chain.from_iterable(files.values())})
    index = {name: i for i, name in enumerate(classes)}
    units = []
    for split, listing in sorted(files.items()):
        if foreign := sorted({_class_of(key) for key, _ in listing} - set(classes)):
            raise SourceError(f"{source}/{split} has classes that {TRAIN} lacks: {', '.join(foreign[:5])}")
        root = storage.join(source, split) if nested else source
        for i, part in enumerate(_batched(sorted(listing), images_per_unit)):
            keys = tuple(key for key, _ in part)
            labels = tuple(index[_class_of(key)] for key in keys)
            digest = hashlib.sha256(repr((part, labels)).encode()).hexdigest()
            units.append(Unit(f"{i:05d}", split, root, keys, labels, digest))
    return Plan(tuple(classes), tuple(units))


def read(unit: Unit) -> Iterator[Image]:
    """The images of a unit, in order. Raises `StorageError` if one cannot be fetched."""
    items = list(zip(unit.keys, unit.labels, strict=True))
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for part in _batched(items, 4 * READ_AHEAD):  # bounded: a unit may hold gigabytes
            fetched = pool.map(lambda item: storage.read(storage.join(unit.root, item[0])), part)
            for (key, label), data in zip(part, fetched, strict=True):
                yield Image(key, label, data)


def sampled(key: str, fraction: float, seed: int) -> bool:
    """Whether `key` belongs to a seeded sample: independent of the listing, so it streams."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64


def _by_split(source: str) -> tuple[dict[str, list[tuple[str, int]]], bool]:
    """Split -> (key, bytes) pairs, and whether the splits are folders (every top folder is one) or all is training."""
    layout = f"{source}/<class>/<image>, or {source}/{{{','.join(SPLITS)}}}/<class>/<image>"
    listing = [(entry.uri[len(source) + 1 :], entry.size) for entry in storage.walk(source)]
    if not listing:
        raise SourceError(f"{source} holds no files: expected images in class folders, {layout}")
    tops = {key.partition("/")[0] for key, _ in listing}
    nested = not tops.isdisjoint(SPLITS)
    if nested and not tops <= set(SPLITS):
        mixed = ", ".join(sorted(tops - set(SPLITS))[:5])
        raise SourceError(f"{source} holds split folders and others beside them ({mixed}): expected {layout}")
    files: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for key, size in listing:
        split, _, inside = key.partition("/") if nested else (TRAIN, "", key)
        if "/" not in inside:
            raise SourceError(f"{storage.join(source, key)} lies in no class folder: expected {layout}")
        files[split].append((inside, size))
    return files, nested


def _class_of(key: str) -> str:
    return key.partition("/")[0]


T = TypeVar("T")


def _batched(items: Sequence[T], n: int) -> Iterator[tuple[T, ...]]:
    """Consecutive runs of n; itertools.batched exists from Python 3.12 on."""
    for start in range(0, len(items), n):
        yield tuple(items[start : start + n])
