"""Sources: a folder or bucket of images -> units of work -> (key, label, bytes), in any of five layouts.

    folders      <class>/<image>, or {train,val,test}/<class>/<image>
    kaggle       ILSVRC/Data/CLS-LOC/... and LOC_val_solution.csv
    tars         ILSVRC2012_img_train.tar (a tar of tars), ILSVRC2012_img_val.tar with its label file
    webdataset   shards *.tar of .jpg and .cls
    parquet      image: struct<bytes, path>, label: int64

The plan is a function of the listing and of the metadata in archives: the same source gives the same units. Classes are
sorted by name, or in the order that the source states. An ImageNet image has the same key in all layouts, see
`units.key_of`.
"""

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice

from igpt_ray import storage
from igpt_ray.data.config import Layout
from igpt_ray.data.sources.folders import plan_folders, plan_kaggle
from igpt_ray.data.sources.imagenet import plan_tars
from igpt_ray.data.sources.parquet import plan_parquet
from igpt_ray.data.sources.ranges import Window
from igpt_ray.data.sources.tars import members
from igpt_ray.data.sources.units import SPLITS, TRAIN, Image, KeyFilter, Plan, UnreadableImage, WorkUnit, key_of
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

PLANNERS: dict[Layout, Callable[[str, int], Plan]] = {
    "folders": plan_folders,
    "kaggle": plan_kaggle,
    "tars": plan_tars,
    "webdataset": plan_webdataset,
    "parquet": plan_parquet,
}

N_DETECT = 1000
"""File names that are read to detect the layout."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def plan(source: str, images_per_unit: int, layout: Layout | None = None) -> Plan:
    """List `source` and divide every split into units of about `images_per_unit` images; archives are not divided.

    Raises `SourceError` if the source is empty, or does not have the given or detected layout.
    """
    return PLANNERS[layout or detect_layout(source)](source, images_per_unit)


def read(unit: WorkUnit, key_filter: KeyFilter | None = None) -> Iterator[Image | UnreadableImage]:
    """The images of a unit in order, unreadable ones included; with `key_filter` only those whose key passes it.

    Raises `StorageError` if a file cannot be fetched, and `SourceError` if the unit as a whole cannot be read. Memory
    is bounded by the window of bytes that is read ahead.
    """
    try:
        yield from unit.content.read(key_filter)
    except SourceError as error:
        raise SourceError(f"unit {unit.split}/{unit.name} cannot be read: {error}") from error


def detect_layout(source: str) -> Layout:
    """The layout of a source, detected from its first file names and, for tars, from the first member of one."""
    head = list(islice(storage.walk(source), N_DETECT))
    names = [storage.relative_to(source, entry.uri).lower() for entry in head]
    if any(name.startswith(("ilsvrc/", "loc_")) for name in names):
        return "kaggle"
    if any(name.endswith(PICTURES) for name in names):
        return "folders"
    tars = [entry for entry in head if entry.uri.lower().endswith(".tar")]
    tables = [name for name in names if name.endswith(".parquet")]
    if tars and tables:
        raise SourceError(f"{source} holds tar and Parquet files: choose one with --layout")
    if tables:
        return "parquet"
    return _of_tars(tars) if tars else "folders"


def _of_tars(tars: list[storage.Entry]) -> Layout:
    if any(storage.name(entry.uri).startswith("ILSVRC2012_img_") for entry in tars):
        return "tars"
    with Window(*tars[0]) as window:
        first = next(members(window), None)
    return "tars" if first is not None and first.name.lower().endswith(".tar") else "webdataset"


def sampled(key: str, fraction: float, seed: int) -> bool:
    """Whether `key` belongs to a seeded sample. The answer does not depend on the listing, so sampling can stream."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64
