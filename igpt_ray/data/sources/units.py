"""What every layout speaks of: images, units of work, plans, and the key of an image."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol, TypeVar

from igpt_ray import storage
from igpt_ray.errors import NotFound, SourceError

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = SPLITS
SPELLINGS = {"train": TRAIN, "training": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
SPLIT_WORD = re.compile(rf"(?<![a-z])(?:{'|'.join(SPELLINGS)})(?![a-z])")

UNLABELLED = -1
"""The label of a test image whose class nobody tells, as Hugging Face has it."""

MOST_BYTES = 128 << 20
"""A larger file is no picture of ours. Nothing larger is ever fetched."""

MOST_CLASSES = 1 << 16

WNID = re.compile(r"(n\d{8})_\d+$")
IMAGENET = re.compile(r"(n\d{8}_\d+|ILSVRC\d{4}_(?:val|test)_\d{8})(?:_n\d{8})?")


class Image(NamedTuple):
    """One encoded picture."""

    key: str
    """See `key_of`: unique in its split as far as the source's names are."""
    label: int
    """Index into the classes, or `UNLABELLED`."""
    data: bytes


class UnreadableImage(NamedTuple):
    """A place where an image should be, and why there is none: for the quarantine."""

    key: str
    reason: str


KeyFilter = Callable[[str], bool]
"""Says of a key whether its image shall be read."""


class Content(Protocol):
    """Where a unit's images lie: each layout has its own, small, frozen and picklable."""

    def identity(self) -> object:
        """All that the images follow from, and nothing that changes when the source is copied elsewhere."""

    def read(self, wanted: KeyFilter | None) -> Iterator[Image | UnreadableImage]: ...


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """What one task turns into one shard."""

    name: str
    """`00000`, `00001` ... within the split, in the order of the listing."""
    split: str
    images: int
    """How many: counted where the listing or an index tells, else estimated from the bytes of an archive."""
    content: Content

    @property
    def digest(self) -> str:
        """sha256 of names, sizes and labels: another listing is another unit.

        Not of times of change or a bucket's ETags: a copy of the data has others, and must give the same shards.
        What changes under its name at equal size is found by making the shard again, as jobs/verify.py does.
        """
        return hashlib.sha256(repr(self.content.identity()).encode("utf-8", "backslashreplace")).hexdigest()


@dataclass(frozen=True)
class Plan:
    classes: tuple[str, ...]
    units: tuple[WorkUnit, ...]


class DraftUnit(NamedTuple):
    """A unit that has no number yet."""

    split: str
    images: int
    content: Content


def numbered(drafts: Iterable[DraftUnit]) -> tuple[WorkUnit, ...]:
    """Units by split; the names of a split have one width, so that they sort as they count."""
    by_split: dict[str, list[DraftUnit]] = defaultdict(list)
    for draft in drafts:
        by_split[draft.split].append(draft)
    units: list[WorkUnit] = []
    for split, parts in sorted(by_split.items()):
        width = max(5, len(str(len(parts) - 1)))
        units += (WorkUnit(f"{i:0{width}d}", split, d.images, d.content) for i, d in enumerate(parts))
    return tuple(units)


def whole_files(
    source: str, entries: Iterable[storage.Entry], bytes_per_image: float, content: Callable[[str, int, str], Content]
) -> Iterator[DraftUnit]:
    """Each file is a unit, `content(path, size, split)`; how many images it holds is guessed from its size."""
    for uri, size in entries:
        path = storage.relative_to(source, uri)
        split = split_of(path)
        yield DraftUnit(split, max(1, round(size / bytes_per_image)), content(path, size, split))


def key_of(path: str) -> str:
    """The key of the image at `path` (below its split, or inside its archive).

    ImageNet's file names are unique by themselves and survive every repacking, so they are the key: without folder
    and extension (`n01440764_10026`, `ILSVRC2012_val_00000001`), and without the class that Hugging Face appends. So
    an image has one key, and one random crop, in all layouts. Any other image is known by its whole path.
    """
    known = IMAGENET.fullmatch(PurePosixPath(path).stem)
    return known[1] if known else path


def split_of(path: str) -> str:
    """The split that an archive's name or folder speaks of, the name first; training if none does."""
    for part in reversed(path.lower().split("/")):
        if named := {SPELLINGS[word] for word in SPLIT_WORD.findall(part)}:
            if len(named) > 1:
                raise SourceError(f"{path!r} names several splits ({', '.join(sorted(named))}): rename it")
            return named.pop()
    return TRAIN


def label_in(label: int, n_classes: int, split: str, where: str) -> int:
    """`label`, if there is such a class; in the test split also `UNLABELLED`."""
    if 0 <= label < n_classes or (split == TEST and label == UNLABELLED):
        return label
    raise SourceError(f"{where} has label {label}: expected 0 to {n_classes - 1}, for there are {n_classes} classes")


def stated_classes(source: str) -> tuple[str, ...] | None:
    """What `classes.txt` says, one name a line in the order of the labels; None if there is no such file."""
    uri = storage.join(source, "classes.txt")
    try:
        names = tuple(line.strip() for line in storage.read(uri).decode().strip().splitlines())
    except NotFound:
        return None
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri} is no UTF-8 text: {error}") from error
    if not names or len(set(names)) < len(names):
        raise SourceError(f"{uri} has empty or repeated names: expected one name a class")
    return names


def unnamed_classes(source: str, n: int, files: str) -> SourceError:
    """The error of a source of more files than are read through for their labels."""
    return SourceError(
        f"{source} holds more than {n} {files} and does not name its classes: put a classes.txt there, one name a line"
        " in the order of the labels"
    )


def observe(seen: dict[int, str], label: int | None, key: str) -> None:
    """Keep the last key of each label: `n01440764_10026`, which tells the class, sorts behind `ILSVRC2012_val_...`."""
    if label is not None and label != UNLABELLED:
        seen[label] = max(key, seen.get(label, ""))


def observed_classes(seen: dict[int, str]) -> tuple[str, ...]:
    """Names for labels out of one key of each: the WordNet id if ImageNet named the image after it, or the number."""
    if not seen or min(seen) < 0 or max(seen) >= MOST_CLASSES:
        raise SourceError(f"labels run from {min(seen, default=None)} to {max(seen, default=None)}: expected 0 and up")
    known = {label: WNID.match(key) for label, key in seen.items()}
    names = [match[1] if (match := known.get(label)) else str(label) for label in range(max(seen) + 1)]
    return tuple(names)


T = TypeVar("T")


def batched(items: Sequence[T], n: int) -> Iterator[tuple[T, ...]]:
    """Consecutive runs of n; itertools.batched exists from Python 3.12 on."""
    for start in range(0, len(items), n):
        yield tuple(items[start : start + n])
