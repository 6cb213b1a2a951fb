"""Sources: a folder or bucket of images -> units of work -> (key, label, bytes), in any of five layouts.

    folders      <class>/<image>, or {train,val,test}/<class>/<image>
    kaggle       ILSVRC/Data/CLS-LOC/... and LOC_val_solution.csv
    tars         ILSVRC2012_img_train.tar (a tar of tars), ILSVRC2012_img_val.tar with its labels beside it
    webdataset   shards *.tar of .jpg and .cls
    parquet      image: struct<bytes, path>, label: int64

The plan is a function of the listing (and of what archives say of themselves): the same place gives the same units.
Classes are sorted by name, or in the order that the source itself states. An image of ImageNet has the same key in
all layouts, see `units.key_of`.
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

LOOKED_AT = 1000
"""Names that tell the layout."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def plan(source: str, images_per_unit: int, layout: Layout | None = None) -> Plan:
    """List `source` and cut every split into units of about `images_per_unit` images; archives stay whole.

    Raises `SourceError` if nothing is there, or if it is not of the layout named or recognised.
    """
    return PLANNERS[layout or recognise(source)](source, images_per_unit)


def read(unit: WorkUnit, wanted: KeyFilter | None = None) -> Iterator[Image | UnreadableImage]:
    """The images of a unit, in order, and what could not be read; only those whose key is `wanted`, if that is given.

    Raises `StorageError` if something cannot be fetched, and `SourceError` if the unit as a whole cannot be read.
    Holds no more than a window of its bytes.
    """
    try:
        yield from unit.content.read(wanted)
    except SourceError as error:
        raise SourceError(f"unit {unit.split}/{unit.name} cannot be read: {error}") from error


def recognise(source: str) -> Layout:
    """The layout of a place, by its first names; of unnamed tars, by the first member of the first."""
    head = list(islice(storage.walk(source), LOOKED_AT))
    names = [storage.relative_to(source, entry.uri).lower() for entry in head]
    if any(name.startswith(("ilsvrc/", "loc_")) for name in names):
        return "kaggle"
    if any(name.endswith(PICTURES) for name in names):
        return "folders"
    tars = [entry for entry in head if entry.uri.lower().endswith(".tar")]
    tables = [name for name in names if name.endswith(".parquet")]
    if tars and tables:
        raise SourceError(f"{source} holds tar and Parquet files: say which to read with --layout")
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
    """Whether `key` belongs to a seeded sample: independent of the listing, so it streams."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64
