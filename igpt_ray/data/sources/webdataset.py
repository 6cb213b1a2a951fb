"""WebDataset: tar shards whose members with the same stem form a sample, such as `000123.jpg` and `000123.cls`.

A unit is a shard, so that planning needs only the listing. Labels are numbers, or names from `classes.txt` in the
source. Without that file, the labels of a few shards are read; a source of many labelled shards raises an error. Shards
without labels, as img2dataset writes them, are read as images without labels.

WebDataset's stem of a member ends at the first dot of its name. Names such as `v1.2_0003.jpg` are common as well: an
image whose extension has several parts is a sample of its own if the archive has a label for exactly its name, or if
there is no plain image of the same stem. Otherwise (`0003.seg.png` next to `0003.jpg`) it is passed over.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from igpt_ray import storage
from igpt_ray.data.sources import listing
from igpt_ray.data.sources.listing import TARS, Listing, count_others, kind_of
from igpt_ray.data.sources.ranges import Window, archive_window
from igpt_ray.data.sources.tars import BLOCK, Member, RejectedMember, members
from igpt_ray.data.sources.units import (
    MAX_BYTES,
    TEST,
    UNLABELLED,
    Image,
    KeyFilter,
    PassedOver,
    Plan,
    Reading,
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

IMAGES = tuple(suffix[1:] for suffix in listing.IMAGES)
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

    def read(self, key_filter: KeyFilter | None) -> Reading:
        index = {name: i for i, name in enumerate(self.names or ())}
        listed: Counter[str] = Counter()
        grouped = 0
        with archive_window(storage.join(self.root, self.path), self.size) as window:
            for sample in _samples(window, key_filter, listed):
                if not isinstance(sample, Sample):
                    yield sample
                    continue
                grouped += sample.members - 1
                if not sample.skipped:
                    yield self._image(sample, index)
        return listed["members"] - grouped

    def _image(self, sample: "Sample", index: dict[str, int]) -> Image | UnreadableImage:
        where = f"{storage.join(self.root, self.path)}: {sample.key}"
        label = _label(sample, where)
        if isinstance(label, str):
            if label not in index:
                raise SourceError(f"{where} has the label {label!r}, which is not one of the {self.n_classes} classes")
            label = index[label]
        if sample.image is None:
            return UnreadableImage(sample.key, sample.problem or "has a label, but no image")
        if label is None and self.split != TEST and self.n_classes:
            return UnreadableImage(sample.key, "has no label: expected a .cls, or a .json with a label")
        label = label_in(UNLABELLED if label is None else label, self.n_classes, where)
        return Image(sample.key, label, sample.image)


class Sample:
    """The image and label members of one stem. The image is fetched only if its key passes the filter."""

    def __init__(self, stem: str):
        self.key = stem
        self.members = 0
        self.size = 0
        """Bytes in the archive."""
        self.has_image = False
        self.image: bytes | None = None
        self.problem = ""
        """Why the image was not fetched."""
        self.skipped = False
        """Its image was filtered out."""
        self.extension = ""
        self.labels: dict[str, bytes] = {}

    def add_image(self, window: Window, member: Member, key_filter: KeyFilter | None) -> None:
        self.has_image = True
        self.key = key_of(member.name)
        self.skipped = key_filter is not None and not key_filter(self.key)
        if not self.skipped and member.size > MAX_BYTES:
            self.problem = f"has {member.size} bytes, more than {MAX_BYTES}"
        elif not self.skipped:
            self.image = window.read_all(member.start, member.size)


def plan_webdataset(listing: Listing, images_per_unit: int) -> Plan:
    """Raises `SourceError` if there are no shards, or the classes are unknown. A unit is a shard of any size."""
    shards = listing.named(TARS)
    if not shards:
        raise SourceError(f"{listing.source} holds no tar shards")
    head = [storage.Entry(listing.uri(path), size) for path, size in shards[: MAX_SURVEYED + 1]]
    first = _peek(head[0])
    classes = stated_classes(listing.root) or (_survey(listing.source, head) if first.labelled else ())
    names = classes if first.named else None

    def shard(path: str, size: int, split: str) -> TarShard:
        return TarShard(listing.root, path, size, split, len(classes), names)

    others = count_others(listing.files, lambda path: path.lower().endswith(TARS) or path == "classes.txt")
    return Plan(classes, numbered(whole_files(shards, first.bytes_per_image, shard)), others)


class ShardHead(NamedTuple):
    """Properties of all shards, estimated from the beginning of the first."""

    bytes_per_image: float
    named: bool
    """Whether labels are class names."""
    labelled: bool
    """Whether a sample has a label."""


def _peek(entry: storage.Entry) -> ShardHead:
    start = list(islice(_labelled(entry), TYPICAL))
    bytes_per_image = sum(sample.size for sample, _ in start) / len(start) if start else entry.size
    labels = [label for _, label in start if label not in (None, UNLABELLED)]
    return ShardHead(bytes_per_image or 1, any(isinstance(label, str) for label in labels), bool(labels))


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
    with archive_window(*entry) as window:
        for sample in _samples(window, lambda key: False, Counter()):
            if isinstance(sample, Sample):
                yield sample, _label(sample, f"{entry.uri}: {sample.key}")


MAX_PENDING = 4
"""Most samples of one stem that are held in memory at the same time."""


def _samples(
    window: Window, key_filter: KeyFilter | None, listed: Counter[str]
) -> Iterator["Sample | UnreadableImage | PassedOver"]:
    """Group consecutive members by stem. A second image with the same stem begins another sample.

    Counts the members of the archive in `listed`.
    """
    pending: dict[str, Sample] = {}
    stem = ""
    for member in members(window):
        listed["members"] += 1
        if isinstance(member, RejectedMember):
            yield UnreadableImage(member.name, member.reason)
            continue
        base, extensions, extension = _split_name(member.name)
        if extension not in IMAGES and extension not in LABELS:
            yield PassedOver(member.name, kind_of(member.name))
            continue
        own = f"{base}.{extensions[: -len(extension) - 1]}" if "." in extensions else base
        if base != stem or (extension in IMAGES and own in pending and pending[own].has_image):
            yield from _complete(stem, pending)
            pending.clear()
            stem = base
        if own not in pending and len(pending) == MAX_PENDING:
            oldest = next(iter(pending))
            yield from _complete(oldest, {oldest: pending.pop(oldest)})
        if extension in LABELS and member.size > LABELS[extension]:
            yield PassedOver(member.name, f".{extension} of more than {LABELS[extension]} bytes")
            continue
        sample = pending.setdefault(own, Sample(own))
        sample.members += 1
        sample.size += member.size + 2 * BLOCK
        if extension in IMAGES:
            sample.extension = extensions
            sample.add_image(window, member, key_filter)
        else:
            sample.labels[extension] = window.read_all(member.start, member.size)
    yield from _complete(stem, pending)


def _split_name(name: str) -> tuple[str, str, str]:
    """The stem of a member up to the first dot of its name, its extensions, and the last of them in lower case."""
    folder, slash, file = name.rpartition("/")
    if file.startswith("."):
        return name, "", ""
    base, _, extensions = file.partition(".")
    return folder + slash + base, extensions, extensions.rpartition(".")[2].lower()


def _complete(stem: str, pending: dict[str, Sample]) -> Iterator[Sample | UnreadableImage | PassedOver]:
    """The samples of one stem, see the module's docstring. Labels of the stem itself are shared by a single image."""
    plain = pending.get(stem)
    dotted = [sample for own, sample in pending.items() if own != stem and sample.has_image and not sample.labels]
    if plain is not None and not plain.has_image and len(dotted) == 1:
        dotted[0].labels = plain.labels
        dotted[0].members += plain.members
        del pending[stem]
        dotted = []
    for sample in pending.values():
        if sample not in dotted or plain is None or not plain.labels:
            yield sample
        elif plain.has_image:
            yield PassedOver(f"{stem}.{sample.extension}", f".{sample.extension}")
        else:
            yield UnreadableImage(sample.key, f"shares the label of {stem} with {len(dotted) - 1} other images")


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
