"""WebDataset: tar shards whose members with the same stem form a sample, such as `000123.jpg` and `000123.cls`.

A unit is a shard, so that planning needs only the listing. Labels are numbers, or names from `classes.txt` in the
source. Without that file, the labels of a few shards are read; a source of many shards raises an error.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

from igpt_ray import storage
from igpt_ray.data.sources.ranges import Window
from igpt_ray.data.sources.tars import BLOCK, Member, RejectedMember, members
from igpt_ray.data.sources.units import (
    MAX_BYTES,
    TEST,
    UNLABELLED,
    Image,
    KeyFilter,
    Plan,
    UnreadableImage,
    key_of,
    label_in,
    numbered,
    observe,
    observed_classes,
    stated_classes,
    unnamed_classes,
    whole_files,
)
from igpt_ray.errors import SourceError

IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = {"cls": 1 << 10, "json": 1 << 20}
"""Extensions of label files, and the largest size in bytes that is read."""
MAX_SURVEYED = 64
"""Most shards whose labels are read while planning, if the classes are not named."""
TYPICAL = 16
"""Images of the first shard from which the mean size is estimated."""


@dataclass(frozen=True, slots=True)
class TarShard:
    """One shard."""

    root: str
    path: str
    size: int
    split: str
    n_classes: int
    names: tuple[str, ...] | None
    """Class names, if the labels are names."""

    def identity(self) -> object:
        return self.path, self.size, self.n_classes, self.names

    def read(self, key_filter: KeyFilter | None) -> Iterator[Image | UnreadableImage]:
        index = {name: i for i, name in enumerate(self.names or ())}
        with Window(storage.join(self.root, self.path), self.size) as window:
            for sample in _samples(window, key_filter):
                yield from self._image(sample, index)

    def _image(self, sample: "Sample | UnreadableImage", index: dict[str, int]) -> Iterator[Image | UnreadableImage]:
        if isinstance(sample, UnreadableImage):
            yield sample
        elif not sample.skipped:
            where = f"{storage.join(self.root, self.path)}: {sample.key}"
            label = _label(sample, where)
            if isinstance(label, str):
                if label not in index:
                    raise SourceError(
                        f"{where} has the label {label!r}, which is not one of the {self.n_classes} classes"
                    )
                label = index[label]
            if sample.image is None:
                yield UnreadableImage(sample.key, f"has no image: expected one of {', '.join(IMAGES)}")
            elif label is None and self.split != TEST:
                yield UnreadableImage(sample.key, "has no label: expected a .cls, or a .json with a label")
            else:
                label = label_in(UNLABELLED if label is None else label, self.n_classes, self.split, where)
                yield Image(sample.key, label, sample.image)


class Sample:
    """The image and label members of one stem. The image is fetched only if its key passes the filter."""

    def __init__(self, stem: str):
        self.stem = stem
        self.key = stem
        self.size = 0
        """Bytes in the archive."""
        self.has_image = False
        self.image: bytes | None = None
        self.skipped = False
        """Its image was filtered out, or is too large."""
        self.labels: dict[str, bytes] = {}

    def add_image(self, window: Window, member: Member, key_filter: KeyFilter | None) -> Iterator[UnreadableImage]:
        self.has_image = True
        self.key = key_of(member.name)
        self.skipped = key_filter is not None and not key_filter(self.key)
        if not self.skipped and member.size > MAX_BYTES:
            self.skipped = True
            yield UnreadableImage(self.key, f"has {member.size} bytes, more than {MAX_BYTES}")
        elif not self.skipped:
            self.image = window.read_all(member.start, member.size)


def plan_webdataset(source: str, images_per_unit: int) -> Plan:
    """Raises `SourceError` if there are no shards, or the classes are unknown. A unit is a shard of any size."""
    listing = (entry for entry in storage.walk(source) if entry.uri.lower().endswith(".tar"))
    head = list(islice(listing, MAX_SURVEYED + 1))
    if not head:
        raise SourceError(f"{source} holds no tar shards")
    first = _peek(head[0])
    classes = stated_classes(source) or _survey(source, head)
    names = classes if first.named else None

    def shard(path: str, size: int, split: str) -> TarShard:
        return TarShard(source, path, size, split, len(classes), names)

    return Plan(classes, numbered(whole_files(source, chain(head, listing), first.bytes_per_image, shard)))


class ShardHead(NamedTuple):
    """Properties of all shards, estimated from the beginning of the first."""

    bytes_per_image: float
    named: bool
    """Whether labels are class names."""


def _peek(entry: storage.Entry) -> ShardHead:
    start = list(islice(_labelled(entry), TYPICAL))
    bytes_per_image = sum(sample.size for sample, _ in start) / len(start) if start else entry.size
    return ShardHead(bytes_per_image or 1, any(isinstance(label, str) for _, label in start))


def _survey(source: str, head: list[storage.Entry]) -> tuple[str, ...]:
    """The classes, from the labels of all samples."""
    if len(head) > MAX_SURVEYED:
        raise unnamed_classes(source, MAX_SURVEYED, "shards")
    numbers: dict[int, str] = {}
    names: set[str] = set()
    for entry in head:
        for sample, label in _labelled(entry):
            if isinstance(label, str):
                names.add(label)
            else:
                observe(numbers, label, sample.key)
    if names and numbers:
        raise SourceError(f"{source} has both numbers and names as labels: add a classes.txt")
    return tuple(sorted(names)) or observed_classes(numbers)


def _labelled(entry: storage.Entry) -> Iterator[tuple["Sample", int | str | None]]:
    with Window(*entry) as window:
        for sample in _samples(window, lambda key: False):
            if isinstance(sample, Sample):
                yield sample, _label(sample, f"{entry.uri}: {sample.key}")


def _samples(window: Window, key_filter: KeyFilter | None) -> Iterator["Sample | UnreadableImage"]:
    """Group consecutive members by stem. A second image with the same stem begins another sample."""
    sample: Sample | None = None
    for member in members(window):
        if isinstance(member, RejectedMember):
            yield UnreadableImage(member.name, member.reason)
            continue
        folder, slash, name = member.name.rpartition("/")
        base, _, extension = name.partition(".")
        stem, extension = folder + slash + base, extension.lower()
        if extension not in IMAGES and extension not in LABELS:
            continue
        if sample is None or stem != sample.stem or (extension in IMAGES and sample.has_image):
            if sample is not None:
                yield sample
            sample = Sample(stem)
        sample.size += member.size + 2 * BLOCK
        if extension in IMAGES:
            yield from sample.add_image(window, member, key_filter)
        elif member.size <= LABELS[extension]:
            sample.labels[extension] = window.read_all(member.start, member.size)
    if sample is not None:
        yield sample


def _label(sample: "Sample", where: str) -> int | str | None:
    """A number, a name, or None if there is no label."""
    if "cls" in sample.labels:
        text = sample.labels["cls"].decode("utf-8", "backslashreplace").strip()
        return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
    try:
        fields = json.loads(sample.labels.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}.json is not valid JSON: {error}") from error
    label = fields.get("label") if isinstance(fields, dict) else None
    if label is None or (isinstance(label, int | str) and not isinstance(label, bool)):
        return label
    raise SourceError(f"{where} has the label {str(label)[:50]}: expected a number or a name")
