"""ImageNet's archives, read by range requests without unpacking; and archives of one class each.

tars: the original archives

    ILSVRC2012_img_train.tar    a tar of one tar per class, <wnid>.tar: each is a unit
    ILSVRC2012_img_val.tar      flat; a text file next to it has one label per line, in the order of the names
    ILSVRC2012_img_test*.tar    flat, unlabelled

class-tars: <class>.tar or <split>/<class>.tar, a tar of images per class, as in the unpacked training archive

Planning reads only the tar headers; of class-tars it reads only the listing.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from igpt_ray import storage
from igpt_ray.data.sources.listing import TARS, Listing, count_others, is_image, kind_of
from igpt_ray.data.sources.ranges import Window, archive_window
from igpt_ray.data.sources.tars import Member, RejectedMember, members
from igpt_ray.data.sources.units import (
    MAX_BYTES,
    MAX_CLASSES,
    TEST,
    TRAIN,
    UNLABELLED,
    DraftUnit,
    Image,
    KeyFilter,
    PassedOver,
    Plan,
    Reading,
    UnreadableImage,
    batched,
    key_of,
    numbered,
    split_of,
)
from igpt_ray.errors import NotFound, SourceError

TYPICAL_BYTES = 110_000
"""Mean size of an image: the 1,281,167 training images have 137.9 GB."""

MAX_FLAT = 1_000_000
"""Most members of a flat archive, whose names are held in memory. ImageNet has 50,000 and 100,000."""


@dataclass(frozen=True, slots=True)
class ClassTar:
    """The images of one class: an inner archive in bytes `start` to `start + size` of the outer one."""

    uri: str
    total: int
    """Bytes of the outer archive."""
    start: int
    size: int
    wnid: str
    label: int

    def identity(self) -> object:
        return storage.name(self.uri), self.total, self.start, self.size, self.wnid, self.label

    def read(self, key_filter: KeyFilter | None) -> Reading:
        try:
            with Window(self.uri, self.total) as window:
                inner = members(window, self.start, self.start + self.size)
                return (yield from _images(window, inner, lambda name: self.label, key_filter))
        except SourceError as error:
            raise SourceError(f"class {self.wnid}: {error}") from error


@dataclass(frozen=True, slots=True)
class WholeClassTar:
    """The images of one class in an archive of their own, which may be compressed."""

    uri: str
    size: int
    label: int

    def identity(self) -> object:
        return storage.name(self.uri), self.size, self.label

    def read(self, key_filter: KeyFilter | None) -> Reading:
        with archive_window(self.uri, self.size) as window:
            label_of, folder = (lambda name: self.label), class_of_tar(self.uri)
            return (yield from _images(window, members(window), label_of, key_filter, folder))


@dataclass(frozen=True, slots=True)
class FlatTar:
    """Consecutive images of a flat archive, from the header at `start` on."""

    uri: str
    total: int
    start: int
    names: tuple[str, ...]
    labels: tuple[int, ...]

    def identity(self) -> object:
        return storage.name(self.uri), self.total, self.start, self.names, self.labels

    def read(self, key_filter: KeyFilter | None) -> Reading:
        label_of = dict(zip(self.names, self.labels, strict=True))
        with Window(self.uri, self.total) as window:
            entries = islice(members(window, self.start), len(self.names))
            yield from _images(window, entries, label_of.get, key_filter)
        return len(self.names)


def plan_tars(listing: Listing, images_per_unit: int) -> Plan:
    """Raises `SourceError` if an archive is truncated, a class is empty, or labels and images do not match."""
    tars = listing.entries(".tar")
    if not tars:
        raise SourceError(
            f"{listing.source} holds no tar archives: expected ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar"
        )
    others = count_others(listing.files, lambda path: path.lower().endswith((".tar", ".txt")))
    nested = {entry: _class_tars(entry, others) for entry in tars if split_of(storage.name(entry.uri)) == TRAIN}
    flat = {entry: _flat(entry) for entry in tars if entry not in nested}
    wnid_of = {entry: _labels(entry.uri, images, listing.entries(".txt")) for entry, images in flat.items()}
    wnids = [storage.name(member.name)[:-4] for inner in nested.values() for member in inner]
    _check_unique(wnids, listing.source)
    classes = tuple(sorted(set(wnids).union(*(labels.values() for labels in wnid_of.values()))))
    index = {wnid: i for i, wnid in enumerate(classes)}
    drafts: list[DraftUnit] = []
    for entry, inner in nested.items():
        drafts += (_class_draft(entry, member, index) for member in inner)
    for entry, images in flat.items():
        labels = {name: index[wnid] for name, wnid in wnid_of[entry].items()}
        drafts += _cut(entry, images, labels, images_per_unit)
    return Plan(classes, numbered(drafts), others)


def plan_class_tars(listing: Listing, images_per_unit: int) -> Plan:
    """Raises `SourceError` if there are no archives, or if a split has a class twice."""
    tars = [entry for entry in listing.entries(TARS) if not storage.name(entry.uri).startswith("._")]
    if not tars:
        raise SourceError(f"{listing.source} holds no tar archives: expected one per class, <class>.tar")
    named = [(split_of(f"{path.rpartition('/')[0]}/"), class_of_tar(path)) for path in map(listing.path, tars)]
    for split in {split for split, _ in named}:
        _check_unique([name for other, name in named if other == split], listing.source)
    classes = tuple(sorted({name for _, name in named}))
    index = {name: i for i, name in enumerate(classes)}
    drafts = [
        DraftUnit(split, max(1, round(size / TYPICAL_BYTES)), WholeClassTar(uri, size, index[name]))
        for (uri, size), (split, name) in zip(tars, named, strict=True)
    ]
    return Plan(classes, numbered(drafts), count_others(listing.files, lambda path: path.lower().endswith(TARS)))


def class_of_tar(path: str) -> str:
    """The class that a tar is named after: `train/n01440764.tar.gz` -> n01440764."""
    suffix = next(suffix for suffix in TARS if path.lower().endswith(suffix))
    return storage.name(path)[: -len(suffix)]


def _check_unique(classes: list[str], source: str) -> None:
    if len(classes) > len(set(classes)):
        name = Counter(classes).most_common(1)[0][0]
        raise SourceError(f"{source} holds the class {name} twice: keep only one archive of training images")


def _class_tars(entry: storage.Entry, others: Counter[str]) -> list[Member]:
    """The inner archives, sorted by class. AppleDouble members are counted in `others`."""
    inner = []
    with archive_window(*entry) as window:
        if window.size != entry.size:
            raise SourceError(f"{entry.uri} is compressed, and its classes cannot be read separately: decompress it")
        for member in members(window):
            if storage.name(member.name).startswith("._"):
                others[kind_of(member.name)] += 1
                continue
            if isinstance(member, RejectedMember) or not member.name.lower().endswith(".tar"):
                reason = member.reason if isinstance(member, RejectedMember) else "is not a tar archive"
                raise SourceError(f"{entry.uri}: {member.name!r} {reason}; expected one tar per class, <wnid>.tar")
            if next(members(window, member.start, member.start + member.size), None) is None:
                raise SourceError(f"{entry.uri}: {member.name} holds no images")
            inner.append(member)
            if len(inner) > MAX_CLASSES:
                raise SourceError(f"{entry.uri} holds more than {MAX_CLASSES} classes")
    return sorted(inner, key=lambda member: storage.name(member.name))


def _class_draft(entry: storage.Entry, member: Member, index: dict[str, int]) -> DraftUnit:
    wnid = storage.name(member.name)[:-4]
    content = ClassTar(entry.uri, entry.size, member.start, member.size, wnid, index[wnid])
    return DraftUnit(TRAIN, max(1, round(member.size / TYPICAL_BYTES)), content)


def _flat(entry: storage.Entry) -> list[Member | RejectedMember]:
    with archive_window(*entry) as window:
        if window.size != entry.size:
            raise SourceError(f"{entry.uri} is compressed, and parts of it cannot be read separately: decompress it")
        entries = list(islice(members(window), MAX_FLAT + 1))
    if len(entries) > MAX_FLAT:
        raise SourceError(f"{entry.uri} has more than {MAX_FLAT} members: for flat archives use WebDataset shards")
    return entries


def _cut(
    entry: storage.Entry, images: list[Member | RejectedMember], labels: dict[str, int], n: int
) -> Iterator[DraftUnit]:
    for part in batched(images, n):
        names = tuple(member.name for member in part)
        numbers = tuple(labels.get(name, UNLABELLED) for name in names)
        content = FlatTar(entry.uri, entry.size, part[0].header, names, numbers)
        yield DraftUnit(split_of(storage.name(entry.uri)), len(part), content)


def _labels(tar: str, images: list[Member | RejectedMember], entries: list[storage.Entry]) -> dict[str, str]:
    """Name in a flat archive -> WordNet id; empty for the test images, which have no labels."""
    if split_of(storage.name(tar)) == TEST:
        return {}
    texts = [e.uri for e in entries if re.search(r"val.*(synset|ground_truth|label).*\.txt$", e.uri.lower())]
    if not texts:
        raise SourceError(
            f"{tar} needs a label file next to it: ILSVRC2012_validation_synsets.txt, one WordNet id per line"
        )
    for member in images:
        if isinstance(member, RejectedMember):  # its name may be wrong as well, and one wrong name shifts all labels
            raise SourceError(
                f"{tar}: {member.name!r} {member.reason}; labels follow the order of names, so all must be readable"
            )
    uri = min(texts, key=lambda text: ("synset" not in text.lower(), text))
    lines = storage.read(uri).decode("utf-8", "backslashreplace").split()
    images = [member for member in images if is_image(member.name)]
    names = sorted({member.name for member in images})
    if not len(lines) == len(names) == len(images):
        raise SourceError(
            f"{uri} has {len(lines)} labels for {len(names)} images in {tar}: expected one line per image"
        )
    if lines and all(line.isdigit() for line in lines):
        lines = _numbered_wnids(uri, lines)
    return dict(zip(names, lines, strict=True))


def _numbered_wnids(uri: str, lines: list[str]) -> list[str]:
    """WordNet ids of the development kit's class numbers. Numbers and ids have different orders (1 is n02119789)."""
    map_uri = storage.join(uri.rpartition("/")[0], "map_clsloc.txt")
    try:
        rows = [line.split() for line in storage.read(map_uri).decode("utf-8", "backslashreplace").splitlines()]
    except NotFound as error:
        raise SourceError(
            f"{uri} has ILSVRC2012 class numbers: put map_clsloc.txt next to it (lines `n02119789 1 kit_fox`),"
            " or use ILSVRC2012_validation_synsets.txt"
        ) from error
    wnid_of = {row[1]: row[0] for row in rows if len(row) >= 2}
    if unknown := sorted(set(lines) - wnid_of.keys()):
        raise SourceError(f"{uri} has the label {unknown[0]}, which is not in {map_uri}")
    return [wnid_of[line] for line in lines]


def _images(
    window: Window,
    entries: Iterator[Member | RejectedMember],
    label_of: Callable[[str], int | None],
    key_filter: KeyFilter | None,
    folder: str = "",
) -> Reading:
    """The images of `entries`. `folder` distinguishes the keys of equal names in several archives."""
    n = 0
    for member in entries:
        n += 1
        if isinstance(member, RejectedMember):
            yield UnreadableImage(member.name, member.reason)
            continue
        key, label = key_of(f"{folder}/{member.name}" if folder else member.name), label_of(member.name)
        if label is None:
            raise SourceError(f"{window.uri} has changed since it was planned: the plan does not list {member.name!r}")
        if key_filter is not None and not key_filter(key):
            continue
        if not is_image(member.name) and not member.name.lower().endswith(".tar"):
            yield PassedOver(member.name, kind_of(member.name))
        elif member.name.lower().endswith(".tar"):
            yield UnreadableImage(key, "is a tar archive inside the archive of its class")
        elif member.size > MAX_BYTES:
            yield UnreadableImage(key, f"has {member.size} bytes, more than {MAX_BYTES}")
        else:
            yield Image(key, label, window.read_all(member.start, member.size))
    return n
