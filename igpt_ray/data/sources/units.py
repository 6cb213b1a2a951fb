"""Types that all layouts share: images, work units, plans; and the key of an image."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol, TypeVar

from igpt_ray import storage
from igpt_ray.data.config import Layout
from igpt_ray.data.sources.listing import File, escaped
from igpt_ray.errors import NotFound, SourceError

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = SPLITS
SPELLINGS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), VAL),
    **dict.fromkeys(("test", "testing"), TEST),
}
"""The usual names of splits, in lower case."""
SPLIT_WORD = re.compile(rf"(?<![a-z])(?:{'|'.join(SPELLINGS)})(?![a-z])")

UNLABELLED = -1
"""The label of an image of unknown class, as in Hugging Face's data sets. Jobs that need labels refuse such images."""

MAX_BYTES = 128 << 20
"""Largest encoded image. Larger files are quarantined without being fetched in full."""

MAX_CLASSES = 1 << 16

WNID = re.compile(r"(n\d{8})_\d+$")
IMAGENET = re.compile(r"(n\d{8}_\d+|ILSVRC\d{4}_(?:val|test)_\d{8})(?:_n\d{8})?")


class Image(NamedTuple):
    """One encoded image."""

    key: str
    """See `key_of`. Unique in its split if the names in the source are."""
    label: int
    """Index into the classes, or `UNLABELLED`."""
    data: bytes


class UnreadableImage(NamedTuple):
    """An image that cannot be read, and the reason, for the quarantine list."""

    key: str
    reason: str


class PassedOver(NamedTuple):
    """A member of an archive that is no image and no label."""

    name: str
    kind: str
    """See `listing.kind_of`."""


Reading = Generator[Image | UnreadableImage | PassedOver, None, int]
"""What a unit holds. The return value is the number of entries that the unit lists, for comparison."""

KeyFilter = Callable[[str], bool]
"""Returns whether the image with this key is to be read."""


class Content(Protocol):
    """The location of a unit's images. Each layout has its own type, small, frozen and picklable."""

    def identity(self) -> object:
        """Everything that determines the images, without what changes when the source is copied elsewhere."""

    def read(self, key_filter: KeyFilter | None) -> Reading: ...


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """The images of one shard."""

    name: str
    """`00000`, `00001` ... in the split, in the order of the listing."""
    split: str
    images: int
    """Number of images: counted from the listing or an index, otherwise estimated from the size of an archive."""
    content: Content

    @property
    def digest(self) -> str:
        """sha256 of names, sizes and labels, so that another listing gives another digest.

        Modification times and ETags are left out, because a copy of the data must give the same shards. A file that
        changes at equal name and size is detected only by computing its shard again, as jobs/verify.py does.
        """
        return hashlib.sha256(repr(self.content.identity()).encode("utf-8", "backslashreplace")).hexdigest()


@dataclass(frozen=True)
class Plan:
    classes: tuple[str, ...]
    """Names in the order of the labels; empty if the source has no labels."""
    units: tuple[WorkUnit, ...]
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of listed files that are no images, by kind (see `listing.kind_of`)."""
    layout: Layout | None = None
    """The layout that was given or detected."""


class DraftUnit(NamedTuple):
    """A work unit before it gets its name."""

    split: str
    images: int
    content: Content


def numbered(drafts: Iterable[DraftUnit]) -> tuple[WorkUnit, ...]:
    """Name the units of each split by number, padded to one width so that names sort in numeric order."""
    by_split: dict[str, list[DraftUnit]] = defaultdict(list)
    for draft in drafts:
        by_split[draft.split].append(draft)
    units: list[WorkUnit] = []
    for split, parts in sorted(by_split.items()):
        width = max(5, len(str(len(parts) - 1)))
        units += (WorkUnit(f"{i:0{width}d}", split, d.images, d.content) for i, d in enumerate(parts))
    return tuple(units)


def whole_files(
    files: Iterable[File], bytes_per_image: float, content: Callable[[str, int, str], Content]
) -> Iterator[DraftUnit]:
    """Each file is one unit, `content(path, size, split)`. Its number of images is estimated from its size."""
    for path, size in files:
        split = split_of(path)
        yield DraftUnit(split, max(1, round(size / bytes_per_image)), content(path, size, split))


def key_of(path: str) -> str:
    """The key of the image at `path` (below its split, or inside its archive).

    ImageNet's file names are unique and are preserved by all layouts, so they are the key, without folder and extension
    (`n01440764_10026`, `ILSVRC2012_val_00000001`) and without the class that Hugging Face appends. An image therefore
    has the same key and the same random crop in all layouts. The key of any other image is its whole path.
    """
    known = IMAGENET.fullmatch(PurePosixPath(path).stem)
    return known[1] if known else escaped(path)


def split_of(path: str) -> str:
    """The split named by an archive's file name, or else by its folders; training if none is named."""
    for part in reversed(path.lower().split("/")):
        if named := {SPELLINGS[word] for word in SPLIT_WORD.findall(part)}:
            if len(named) > 1:
                raise SourceError(f"{path!r} names several splits ({', '.join(sorted(named))}): rename it")
            return named.pop()
    return TRAIN


def label_in(label: int, n_classes: int, where: str) -> int:
    """`label` if it is a class or `UNLABELLED`. Raises `SourceError` otherwise."""
    if 0 <= label < n_classes or label == UNLABELLED:
        return label
    if n_classes == 0:
        raise SourceError(
            f"{where} has label {label}, but the beginning of the source has no labels: add a classes.txt with one name"
            " per line in the order of the labels"
        )
    raise SourceError(f"{where} has label {label}: expected 0 to {n_classes - 1} ({n_classes} classes)")


def stated_classes(root: str) -> tuple[str, ...] | None:
    """Class names from `classes.txt`, one per line in the order of the labels; None if the file does not exist."""
    uri = storage.join(root, "classes.txt")
    try:
        names = tuple(line.strip() for line in storage.read(uri).decode("utf-8-sig").strip().splitlines())
    except NotFound:
        return None
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri} is not UTF-8 text: {error}") from error
    if not names or len(set(names)) < len(names):
        raise SourceError(f"{uri} has empty or repeated names: expected one name per class")
    return names


def unnamed_classes(source: str, n: int, files: str) -> SourceError:
    """The error for a source without class names that has too many files to read all labels."""
    return SourceError(
        f"{source} holds more than {n} {files} and does not name its classes: add a classes.txt with one name per line"
        " in the order of the labels"
    )


def observe(seen: dict[int, str], label: int | None, key: str) -> None:
    """Keep the greatest key of each label: `n01440764_10026`, which has the class, sorts after `ILSVRC2012_val_...`."""
    if label is not None and label != UNLABELLED:
        seen[label] = max(key, seen.get(label, ""))


def observed_classes(seen: dict[int, str]) -> tuple[str, ...]:
    """Class names from one key per label: the WordNet id in an ImageNet key, otherwise the label's number.

    Empty if no label was seen.
    """
    if not seen:
        return ()
    if min(seen) < 0 or max(seen) >= MAX_CLASSES:
        raise SourceError(f"labels run from {min(seen)} to {max(seen)}: expected 0 to {MAX_CLASSES - 1}")
    matches = {label: WNID.match(key) for label, key in seen.items()}
    names = [match[1] if (match := matches.get(label)) else str(label) for label in range(max(seen) + 1)]
    return tuple(names)


T = TypeVar("T")


def batched(items: Sequence[T], n: int) -> Iterator[tuple[T, ...]]:
    """Consecutive runs of n; itertools.batched exists from Python 3.12 on."""
    for start in range(0, len(items), n):
        yield tuple(items[start : start + n])
