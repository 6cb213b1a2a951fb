"""Images in files of their own: class folders as in torchvision, flat folders, Tiny ImageNet and Kaggle's ImageNet.

    folders         <class>/<image>, or <split>/<class>/<image>; a test split may be flat
    classes         <class>/<image>; the top folders are classes whatever their names
    flat            images at any depth, or below <split>/; no labels
    tiny-imagenet   train/<wnid>/images/<image>, val/images/<image>, val/val_annotations.txt, test/images/<image>
    kaggle          ILSVRC/Data/CLS-LOC/{train/<wnid>/<image>, val/<image>, test/<image>}, LOC_val_solution.csv

The plan holds the name of every file, which suits millions of images but not billions.
"""

import csv
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from igpt_ray import storage
from igpt_ray.data.config import Layout
from igpt_ray.data.sources.listing import LFS_POINTER, UNSUPPORTED_IMAGES, File, Listing, count_others, is_image
from igpt_ray.data.sources.ranges import fetched
from igpt_ray.data.sources.units import (
    MAX_BYTES,
    SPELLINGS,
    SPLIT_WORD,
    SPLITS,
    TEST,
    TRAIN,
    UNLABELLED,
    VAL,
    DraftUnit,
    Image,
    KeyFilter,
    Plan,
    Reading,
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

ImageFiles = list[File]
"""Paths relative to the folder of the split."""


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

    def read(self, key_filter: KeyFilter | None) -> Reading:
        """Raises `StorageError` if a file cannot be fetched, `SourceError` if its size is not the listed one."""
        items = list(zip(map(key_of, self.paths), self.paths, self.sizes, self.labels, strict=True))
        items = [item for item in items if key_filter is None or key_filter(item[0])]
        ahead = READ_AHEAD if storage.is_remote(self.root) else READ_AHEAD_DISK
        for part in fetched(batched(items, FILES_PER_FETCH), self._fetch, ahead):
            yield from part
        return len(items)

    def _fetch(self, items: tuple[tuple[str, str, int, int], ...]) -> list[Image | UnreadableImage]:
        images: list[Image | UnreadableImage] = []
        for key, path, size, label in items:
            if size > MAX_BYTES:
                images.append(UnreadableImage(key, f"has more than {MAX_BYTES} bytes"))
                continue
            uri = storage.join(self.root, path)
            data = storage.read(uri, 0, size + 1)
            if len(data) != size:
                more = "more than" if len(data) > size else "only"
                raise SourceError(
                    f"{uri} has changed since it was listed: it has {more} {min(len(data), size)} bytes, the listing"
                    f" {size}; repeat the command when the source is complete"
                )
            if data.startswith(LFS_POINTER):
                images.append(UnreadableImage(key, "is a Git LFS pointer instead of the image: run `git lfs pull`"))
            else:
                images.append(Image(key, label, data))
        return images


def plan_folders(listing: Listing, images_per_unit: int) -> Plan:
    """Plan class folders. Raises `SourceError` if there are no images, or an image is not in a class folder."""
    return _plan_classes(listing, split_folders(listing), images_per_unit)


def plan_classes(listing: Listing, images_per_unit: int) -> Plan:
    """Plan class folders without split folders: all images are for training."""
    return _plan_classes(listing, {}, images_per_unit)


def plan_flat(listing: Listing, images_per_unit: int) -> Plan:
    """Plan images without labels, at any depth."""
    drafts: list[DraftUnit] = []
    for split, (root, files) in _by_split(listing, split_folders(listing)).items():
        drafts += _cut(split, root, files, lambda path: UNLABELLED, images_per_unit)
    return _plan((), drafts, listing)


def _plan_classes(listing: Listing, tops: dict[str, str], images_per_unit: int) -> Plan:
    by_split = _by_split(listing, tops)
    flat_test = TEST in by_split and len(by_split) > 1 and all("/" not in path for path, _ in by_split[TEST][1])
    labelled = {split: files for split, (_, files) in by_split.items() if not (flat_test and split == TEST)}
    for split, files in labelled.items():
        if loose := next((path for path, _ in files if "/" not in path), None):
            raise SourceError(
                f"{storage.join(by_split[split][0], loose)} is not in a class folder: expected {_expected(listing)};"
                " for images without labels use --layout flat"
            )
    classes = {split: {_class_of(path) for path, _ in files} for split, files in labelled.items()}
    names = tuple(sorted(set().union(*classes.values())))
    index = {name: i for i, name in enumerate(names)}
    if new := set(names) - classes.get(TRAIN, set(names)):
        log.warning("%d of %d classes have no training image: %s", len(new), len(names), ", ".join(sorted(new)[:5]))
    drafts: list[DraftUnit] = []
    for split, (root, files) in by_split.items():
        label_of = (lambda path: index[_class_of(path)]) if split in labelled else (lambda path: UNLABELLED)
        drafts += _cut(split, root, files, label_of, images_per_unit)
    return _plan(names, drafts, listing)


def plan_tiny_imagenet(listing: Listing, images_per_unit: int) -> Plan:
    """Plan Tiny ImageNet; test images are unlabelled. Raises `SourceError` if a validation image has no label."""
    files: dict[str, ImageFiles] = defaultdict(list)
    for path, size in listing.files:
        split, _, inside = path.partition("/")
        if is_image(path):
            if split not in SPLITS or inside.split("/")[:-1][-1:] != ["images"]:
                raise SourceError(f"{listing.uri(path)} does not belong to Tiny ImageNet: expected {TINY}")
            files[split].append(File(inside, size))
    validated = _annotations(listing.uri("val/val_annotations.txt"), files[VAL])
    wnids = {_class_of(path) for path, _ in files[TRAIN]} | set(validated.values())
    return _plan_imagenet(listing, listing, files, wnids, validated, images_per_unit)


def plan_kaggle(listing: Listing, images_per_unit: int) -> Plan:
    """Plan Kaggle's ImageNet; test images are unlabelled. Raises `SourceError` if a validation image has no CSV row."""
    images = listing.below("ILSVRC/Data/CLS-LOC")
    files: dict[str, ImageFiles] = defaultdict(list)
    for file in images.files:
        split, slash, path = file.path.partition("/")
        if is_image(file.path):
            if split not in SPLITS or not slash or ("/" in path) != (split == TRAIN):
                raise SourceError(
                    f"{images.uri(file.path)} does not belong to Kaggle's layout: train/<wnid>/<image>, val/<image>"
                )
            files[split].append(File(path, file.size))
    if not files:
        raise SourceError(f"{images.root} holds no images: expected the unpacked archive of Kaggle's ImageNet")
    validated = _solution(listing.uri("LOC_val_solution.csv"), files[VAL])
    wnids = {_class_of(path) for path, _ in files[TRAIN]} | set(validated.values())
    return _plan_imagenet(listing, images, files, wnids, validated, images_per_unit)


def _plan_imagenet(
    listing: Listing,
    images: Listing,
    files: dict[str, ImageFiles],
    wnids: set[str],
    validated: dict[str, str],
    images_per_unit: int,
) -> Plan:
    """Class folders of training images, and validation images whose classes are listed in `validated` by path."""
    classes = tuple(sorted(wnids))
    index = {name: i for i, name in enumerate(classes)}
    label_of = {
        TRAIN: lambda path: index[_class_of(path)],
        VAL: lambda path: index[validated[path]],
        TEST: lambda path: UNLABELLED,
    }
    drafts: list[DraftUnit] = []
    for split, chosen in files.items():
        drafts += _cut(split, images.uri(split), chosen, label_of[split], images_per_unit)
    return _plan(classes, drafts, listing)


def _annotations(uri: str, files: ImageFiles) -> dict[str, str]:
    """Validation image -> WordNet id, from lines such as `val_0.JPEG\tn03444034\t0\t32\t44\t62`."""
    if not files:
        return {}
    try:
        rows = [line.split("\t") for line in storage.read(uri).decode("utf-8-sig").splitlines()]
    except (NotFound, UnicodeDecodeError) as error:
        raise SourceError(f"{uri} is needed for the labels of {len(files)} validation images: {error}") from error
    wnid_of = {row[0]: row[1] for row in rows if len(row) >= 2}
    if missing := sorted(path for path, _ in files if storage.name(path) not in wnid_of):
        raise SourceError(f"{uri} has no label for {len(missing)} validation images, such as {', '.join(missing[:3])}")
    return {path: wnid_of[storage.name(path)] for path, _ in files}


def _solution(uri: str, files: ImageFiles) -> dict[str, str]:
    """Validation image -> WordNet id, from lines such as `ILSVRC2012_val_00000001,n03995372 85 1 499 272 ...`."""
    if not files:
        return {}
    try:
        text = storage.read(uri).decode("utf-8-sig")
    except (NotFound, UnicodeDecodeError) as error:
        raise SourceError(f"{uri} is needed for the labels of {len(files)} validation images: {error}") from error
    boxes = {row[0]: row[1].split() for row in csv.reader(text.splitlines()) if len(row) == 2}
    labels = {path: boxes.get(path.rpartition(".")[0]) for path, _ in files}
    if missing := sorted(path for path, words in labels.items() if not words):
        raise SourceError(f"{uri} has no label for {len(missing)} validation images, such as {', '.join(missing[:3])}")
    return {path: words[0] for path, words in labels.items() if words}


def _cut(split: str, root: str, files: ImageFiles, label_of: Callable[[str], int], n: int) -> Iterator[DraftUnit]:
    """Units of n images, sorted by path."""
    for part in batched(sorted(files), n):
        paths, sizes = tuple(file.path for file in part), tuple(file.size for file in part)
        yield DraftUnit(split, len(part), Files(root, paths, sizes, tuple(label_of(path) for path in paths)))


def _plan(classes: tuple[str, ...], drafts: list[DraftUnit], listing: Listing) -> Plan:
    """The plan, with every file that is in no unit counted as passed over."""
    if not drafts:
        raise SourceError(f"{listing.source} holds no images: expected {_expected(listing)}")
    others = count_others(listing.files, is_image)
    planned = sum(draft.images for draft in drafts)
    if len(listing.files) != planned + others.total():
        outside = len(listing.files) - planned - others.total()
        others["images outside of the layout"] = outside
    return Plan(classes, numbered(drafts), others)


# ------------------------------------------------------------------------------------------------ reading folder names

TINY = "train/<wnid>/images/<image>, val/images/<image> with val/val_annotations.txt, test/images/<image>"


def split_folders(listing: Listing) -> dict[str, str]:
    """Top folder -> split, if the top folders of the images are splits by the usual names; otherwise empty.

    Raises `SourceError` if only some of them are, or if two of them name one split.
    """
    tops = sorted({path.partition("/")[0] for path, _ in listing.files if is_image(path) and "/" in path})
    named = {top: SPELLINGS[top.lower()] for top in tops if top.lower() in SPELLINGS}
    if named and (others := [top for top in tops if top not in named]):
        raise SourceError(
            f"{listing.source} holds the folders {_some(list(named))}, which look like splits, and others"
            f" ({_some(others)}): expected {_expected(listing)}. If all of them are classes, add --layout classes;"
            " if they are splits, move the others elsewhere"
        )
    if len(set(named.values())) < len(named):
        raise SourceError(
            f"{listing.source} holds the folders {_some(list(named))}, of which several name the same split: expected"
            f" {_expected(listing)}. If all of them are classes, add --layout classes"
        )
    return named


def detect_folders(listing: Listing) -> Layout:
    """Which of `folders`, `flat` and `tiny-imagenet` a listing of images has.

    Raises `SourceError` if it can be read in two ways, with the words that choose one.
    """
    if _is_tiny_imagenet(listing):
        return "tiny-imagenet"
    tops = split_folders(listing)
    if not tops:
        _check_tops(listing)
    by_split = {split: [path for path, _ in files] for split, (_, files) in _by_split(listing, tops).items()}
    flat = [split for split, paths in by_split.items() if all("/" not in path for path in paths)]
    if len(flat) == len(by_split) or _is_img2dataset(listing, by_split):
        return "flat"
    if unlabelled := [split for split in flat if split != TEST]:
        raise SourceError(
            f"the images of {unlabelled[0]} in {listing.source} are in no class folders, but those of other splits"
            " are: sort them into class folders, or use --layout flat to read all images without labels. Labels of"
            " validation images are read from val/val_annotations.txt (Tiny ImageNet) and LOC_val_solution.csv (Kaggle)"
        )
    labelled = [path for split, paths in by_split.items() if split not in flat for path in paths]
    depths = sorted({path.count("/") for path in labelled})
    choice = "add --layout folders if the first folder is the class, or --layout flat to read all images without labels"
    if len(depths) > 1:
        shallow, deep = (
            next(path for path in labelled if path.count("/") == depth) for depth in (depths[0], depths[-1])
        )
        raise SourceError(
            f"{listing.source} holds images at different depths, {shallow!r} and {deep!r}: {choice}; or point --source"
            " at one of its folders"
        )
    if depths[0] > 1:
        inner: dict[str, set[str]] = defaultdict(set)
        for path in labelled:
            name, folder = path.split("/")[:2]
            inner[name].add(folder)
        first, *others = inner.values()
        if all(folders == first for folders in others):
            where = f"the only folder {next(iter(inner))!r}" if not others else f"each of its {len(inner)} folders"
            raise SourceError(
                f"{listing.source} may be one folder too high: {where} holds {_some(sorted(first))}. Point --source at"
                f" the folder that holds the classes or splits, or {choice}"
            )
    return "folders"


def _check_tops(listing: Listing) -> None:
    """Raise `SourceError` if the top folders are no splits, but resemble them or hold some."""
    tops: dict[str, set[str]] = defaultdict(set)
    for path in (path for path, _ in listing.files if is_image(path)):
        first, *rest = path.split("/")
        if rest:
            tops[first].add(rest[0].lower() if len(rest) > 1 else "")
    alike = [top for top in tops if SPLIT_WORD.search(top.lower())]
    if alike and len(alike) == len(tops):
        raise SourceError(
            f"the folders of {listing.source} look like splits ({_some(alike)}): rename them to"
            f" {', '.join(SPLITS)}, or add --layout classes if they are classes"
        )
    if tops and all(folders and folders <= SPELLINGS.keys() for folders in tops.values()):
        where = next(iter(tops))
        raise SourceError(
            f"{listing.source} is one folder too high, because {where} holds the splits"
            f" {_some(sorted(tops[where]))}: use --source {listing.uri(where)}, or --layout classes if the top folders"
            " are classes and all images are for training"
        )


def _is_tiny_imagenet(listing: Listing) -> bool:
    paths = {path for path, _ in listing.files}
    if "val/val_annotations.txt" in paths:
        return True
    images = [path.split("/") for path in paths if is_image(path)]
    train = [parts for parts in images if parts[0] == TRAIN]
    inside = all(len(parts) == 4 and parts[2] == "images" for parts in train)
    return bool(train) and inside and all(parts[1] == "images" for parts in images if parts[0] != TRAIN)


def _is_img2dataset(listing: Listing, by_split: dict[str, list[str]]) -> bool:
    """Whether folders are the numbered shards of img2dataset, which writes a .json for every image."""
    if set(by_split) != {TRAIN} or not all(_class_of(path).isdigit() for path in by_split[TRAIN]):
        return False
    stems = {path[:-5] for path, _ in listing.files if path.endswith(".json")}
    return all(path.rpartition(".")[0] in stems for path in by_split[TRAIN])


def _by_split(listing: Listing, tops: dict[str, str]) -> dict[str, tuple[str, ImageFiles]]:
    """Split -> (URI of its folder, images). Without split folders, all images are for training."""
    files: dict[str, tuple[str, ImageFiles]] = {}
    for file in listing.files:
        if is_image(file.path):
            top, _, inside = file.path.partition("/")
            if tops and top not in tops:  # a loose file next to the split folders
                raise SourceError(
                    f"{listing.uri(file.path)} is next to the split folders {_some(list(tops))}: expected"
                    f" {_expected(listing)}; remove it, or move it into a folder"
                )
            split, root = (tops[top], listing.uri(top)) if tops else (TRAIN, listing.root)
            files.setdefault(split, (root, []))[1].append(File(inside, file.size) if tops else file)
    return files


def unsupported(passed_over: Counter[str]) -> Counter[str]:
    """The images of formats that are not read, among the files that were passed over."""
    return Counter({kind: n for kind, n in passed_over.items() if kind in UNSUPPORTED_IMAGES})


def _expected(listing: Listing) -> str:
    return f"{listing.source}/<class>/<image>, or {listing.source}/{{{','.join(SPLITS)}}}/<class>/<image>"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _class_of(path: str) -> str:
    return path.partition("/")[0]
