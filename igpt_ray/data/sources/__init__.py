"""Sources: a folder or bucket of images -> units of work -> (key, label, bytes), in any of ten layouts.

    folders, classes, flat, tiny-imagenet, kaggle   files of their own, see `folders`
    cifar                                           the binary version, see `cifar`
    tars, class-tars                                ImageNet's archives, see `imagenet`
    webdataset                                      shards *.tar of .jpg and .cls, also without labels, see `webdataset`
    parquet                                         image: struct<bytes, path>, label: int64, and similar, see `parquet`

The plan is a function of the listing and of the metadata in archives: the same source gives the same units. Classes are
sorted by name, or in the order that the source states. An ImageNet image has the same key in all layouts, see
`units.key_of`.

Every listed file or member of an archive is read, or unreadable, or passed over because it is no image; `read` compares
the numbers.
"""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from igpt_ray import storage
from igpt_ray.data.config import Layout
from igpt_ray.data.sources.cifar import is_cifar, plan_cifar
from igpt_ray.data.sources.folders import (
    detect_folders,
    plan_classes,
    plan_flat,
    plan_folders,
    plan_kaggle,
    plan_tiny_imagenet,
    unsupported,
)
from igpt_ray.data.sources.imagenet import class_of_tar, plan_class_tars, plan_tars
from igpt_ray.data.sources.listing import CONTAINERS, TARS, File, Listing, is_image, kind_of, list_files
from igpt_ray.data.sources.parquet import plan_parquet
from igpt_ray.data.sources.ranges import archive_window
from igpt_ray.data.sources.tars import members
from igpt_ray.data.sources.units import (
    MAX_CLASSES,
    SPLITS,
    TRAIN,
    WNID,
    Image,
    KeyFilter,
    PassedOver,
    Plan,
    UnreadableImage,
    WorkUnit,
    key_of,
)
from igpt_ray.data.sources.webdataset import plan_webdataset
from igpt_ray.errors import SourceError

__all__ = [
    "SPLITS",
    "TRAIN",
    "Image",
    "KeyFilter",
    "Layout",
    "Plan",
    "UnreadableImage",
    "WorkUnit",
    "key_of",
    "plan",
    "read",
    "sampled",
]

log = logging.getLogger(__name__)

PLANNERS: dict[Layout, Callable[[Listing, int], Plan]] = {
    "folders": plan_folders,
    "classes": plan_classes,
    "flat": plan_flat,
    "kaggle": plan_kaggle,
    "tiny-imagenet": plan_tiny_imagenet,
    "cifar": plan_cifar,
    "tars": plan_tars,
    "class-tars": plan_class_tars,
    "webdataset": plan_webdataset,
}


def plan(
    source: str,
    images_per_unit: int,
    layout: Layout | None = None,
    columns: Sequence[str] = (),
) -> Plan:
    """List `source` and divide every split into units of about `images_per_unit` images; archives are not divided.

    `columns` names Parquet columns, as image=NAME and label=NAME. Raises `SourceError` if the source is empty,
    does not have the given layout, or can be read in several ways.
    """
    listing = list_files(source)
    if not listing.files:
        raise SourceError(f"{source} does not exist or holds no files: expected images, archives or Parquet files")
    layout = layout or detect_layout(listing)
    if columns and layout != "parquet":
        raise SourceError(f"--columns names columns of Parquet files, but {source} has the layout {layout}")
    if layout == "parquet":
        made = plan_parquet(listing, images_per_unit, dict(word.split("=", 1) for word in columns))
    else:
        made = PLANNERS[layout](listing, images_per_unit)
    formats = unsupported(made.passed_over)
    if others := made.passed_over - formats:
        counts = ", ".join(f"{n} {kind}" for kind, n in others.most_common(8))
        log.info("%s: %d files are passed over, because they are no images: %s", source, others.total(), counts)
    if formats:
        counts = ", ".join(f"{n} {kind}" for kind, n in formats.items())
        log.warning("%s: %s are passed over, formats that are not read: convert them to JPEG or PNG", source, counts)
    return replace(made, layout=layout)


def read(
    unit: WorkUnit, key_filter: KeyFilter | None = None, passed_over: Counter[str] | None = None
) -> Iterator[Image | UnreadableImage]:
    """The images of a unit in order, unreadable ones included; with `key_filter` only those whose key passes it.

    Members of archives that are no images are counted by kind in `passed_over`. Raises `StorageError` if a file cannot
    be fetched, and `SourceError` if the unit as a whole cannot be read, or if an entry of it is missing. Memory is
    bounded by the window of bytes that is read ahead.
    """
    entries, n, others = unit.content.read(key_filter), 0, Counter[str]() if passed_over is None else passed_over
    try:
        while True:
            try:
                entry = next(entries)
            except StopIteration as end:
                listed = end.value
                break
            n += 1
            if isinstance(entry, PassedOver):
                others[entry.kind] += 1
            else:
                yield entry
    except SourceError as error:
        raise SourceError(f"unit {unit.split}/{unit.name} cannot be read: {error}") from error
    if key_filter is None and n != listed:
        raise SourceError(f"unit {unit.split}/{unit.name} lists {listed} entries, but {n} of them were read")


def detect_layout(listing: Listing) -> Layout:
    """The layout of a source by its file names and, for tars, by the first members of the first one.

    Raises `SourceError` if several layouts are possible, or none.
    """
    names = [path for path, _ in listing.files]
    if any(name.lower().startswith(("ilsvrc/", "loc_")) for name in names):
        return "kaggle"
    if is_cifar(listing):
        return "cifar"
    tars, tables = listing.named(TARS), listing.named(".parquet")
    images = sum(map(is_image, names))
    if tars and tables and {t.path.partition(".")[0] for t in tables} <= {t.path.partition(".")[0] for t in tars}:
        tables = []  # img2dataset writes a table of metadata next to each tar
    kinds = {"tar": bool(tars), "Parquet": bool(tables), "image": images > 0}
    if sum(kinds.values()) > 1:
        several = " and ".join(kind for kind, present in kinds.items() if present)
        raise SourceError(f"{listing.source} holds {several} files: choose one with --layout, or point --source at it")
    if tables:
        return "parquet"
    if tars:
        return _of_tars(listing, tars)
    if not images:
        container = next((name for name in names if kind_of(name) in CONTAINERS), None)
        if container:
            raise SourceError(f"{listing.uri(container)} is {CONTAINERS[kind_of(container)]}")
        kinds_held = ", ".join(sorted({kind_of(name) for name in names})[:8])
        raise SourceError(f"{listing.source} holds no JPEG, PNG or WebP, but files of other kinds: {kinds_held}")
    return detect_folders(listing)


def _of_tars(listing: Listing, tars: list[File]) -> Layout:
    if any(storage.name(path).startswith("ILSVRC2012_img_") for path, _ in tars):
        return "tars"
    with archive_window(listing.uri(tars[0].path), tars[0].size) as window:
        first = [member.name.lower() for member in itertools.islice(members(window), 8)]
    first = [name for name in first if not storage.name(name).startswith("._")]
    if any(name.endswith(".tar") for name in first):
        return "tars"
    classes = [class_of_tar(path) for path, _ in tars[:MAX_CLASSES]]
    if all(WNID.match(f"{name}_1") for name in classes):
        return "class-tars"
    if not any(name.endswith((".cls", ".json", ".txt")) for name in first) and not any(
        character.isdigit() for name in classes for character in name
    ):
        raise SourceError(
            f"{listing.source} holds tars without labels ({', '.join(classes[:3])}): add --layout class-tars if each is"
            " named after the class of its images, or --layout webdataset if the images have no labels"
        )
    return "webdataset"


def sampled(key: str, fraction: float, seed: int) -> bool:
    """Whether `key` belongs to a seeded sample. The answer does not depend on the listing, so sampling can stream."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64
