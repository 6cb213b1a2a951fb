"""Images -> palette -> token shards, with Ray Data.

`fit_palette`: units -> histogram of prepared pixels, summed on the driver (2^24 counts) -> faiss.
`prepare`:     units x views -> one shard each, on actors -> manifest, written last.
"""

import functools
import hashlib
import json
import logging
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from igpt_ray import config, images, shards, sources, storage
from igpt_ray.errors import ImageError, NotFound, PaletteError, SourceError, TokenStoreError
from igpt_ray.flows.pool import spread
from igpt_ray.palette import COLOURS, Palette, pack, quality, swatches
from igpt_ray.shards import Kind, Manifest, Quarantined, Shard, TokenStore
from igpt_ray.sources import TRAIN, Unit, Unreadable

log = logging.getLogger(__name__)

PALETTE_UNIT = 1000
"""Images per task while sampling pixels."""

QUARANTINE = TypeAdapter(list[Quarantined])

# ------------------------------------------------------------------------------------------------ palette


def fit_palette(settings: config.Palette) -> dict[str, Any]:
    """Sample training images, count their colours after the pixel pipeline, fit k of them. Writes .npy, .json, .png."""
    started = time.perf_counter()
    plan = sources.plan(settings.source, PALETTE_UNIT, settings.layout)
    units = [unit for unit in plan.units if unit.split == TRAIN]
    total = sum(unit.images for unit in units)  # an estimate where archives hold them, so the sample's size is one too
    if total == 0:
        raise SourceError(f"{settings.source} has no {TRAIN} split to fit a palette on")
    arguments = {"pixels": settings.pixels, "fraction": settings.images / total, "seed": settings.seed}
    histogram = np.zeros(COLOURS, np.int64)
    sampled = unreadable = 0
    for counted in spread(units, CountColours, arguments, settings.pool):
        histogram[counted.colours] += counted.counts
        sampled += counted.images
        unreadable += counted.unreadable
        log.info("%d images sampled", sampled)
    palette = Palette.fit(histogram, settings.k, settings.seed, settings.gpu)
    report = {
        "palette": settings.out,
        "fingerprint": palette.fingerprint,
        "k": settings.k,
        "pipeline": images.PIPELINES[settings.pixels.pipeline],
        "images": sampled,
        "unreadable": unreadable,
        **quality(palette, histogram),
        "seconds": round(time.perf_counter() - started, 2),
    }
    palette.save(settings.out)
    storage.write(_sidecar(settings.out), json.dumps({**report, "made_by": config.provenance(settings)}).encode())
    storage.write(_sidecar(settings.out, ".png"), images.png(swatches(palette)))
    return report


class Counted(NamedTuple):
    """The distinct prepared colours of a unit, packed, and how often each occurs."""

    colours: NDArray[np.uint32]
    counts: NDArray[np.int64]
    images: int
    unreadable: int


class CountColours:
    """Unit -> Counted, of a seeded sample of its images."""

    def __init__(self, pixels: config.Pixels, fraction: float, seed: int):
        self.pixels = pixels
        self.wanted = functools.partial(sources.sampled, fraction=fraction, seed=seed)

    def __call__(self, unit: Unit) -> Counted:
        pixels, unreadable = [], 0
        for image in sources.read(unit, self.wanted):
            if isinstance(image, Unreadable):
                unreadable += 1
                continue
            try:
                pixels.append(view_of(image.data, self.pixels, unit.split, image.key, 0))
            except ImageError:
                unreadable += 1  # jobs/prepare.py names it; here it only misses from the sample
        packed = pack(np.stack(pixels)) if pixels else np.empty(0, np.uint32)
        colours, counts = np.unique(packed, return_counts=True)
        return Counted(colours, counts, len(pixels), unreadable)


def _sidecar(palette: str, ending: str = ".json") -> str:
    return palette.removesuffix(".npy") + ending


# ------------------------------------------------------------------------------------------------ tokens


def prepare(settings: config.Prepare) -> dict[str, Any]:
    """Write every shard that is not there yet, then the manifest. A repeat completes what is missing."""
    started = time.perf_counter()
    pipeline = images.PIPELINES[settings.pixels.pipeline]
    palette = _load_palette(settings.palette, pipeline)
    kind = Kind(n_px=settings.pixels.n_px, n_vocab=len(palette), palette=palette.fingerprint, pipeline=pipeline)
    plan = sources.plan(settings.source, settings.shard_images, settings.layout)
    tasks = [(unit, view) for unit in plan.units for view in range(settings.views if unit.split == TRAIN else 1)]
    tasks.sort(key=lambda task: (task[0].split, task[1], task[0].name))
    committed = _committed(settings.tokens, kind, tasks)
    palette.save(storage.join(settings.tokens, "palette.npy"))
    made: list[Shard] = []
    quarantined: list[tuple[str, Quarantined]] = []
    arguments = {"root": settings.tokens, "kind": kind, "pixels": settings.pixels, "committed": committed}
    n_images = 0
    for shard, bad in spread(tasks, MakeShard, arguments, settings.pool):
        made.append(shard)
        quarantined += [(shard.split, image) for image in bad]
        n_images += shard.rows
        log.info("%d of %d shards, %d images, %d in quarantine", len(made), len(tasks), n_images, len(quarantined))
    _check_budget(quarantined, n_images + len(quarantined), settings)
    manifest = Manifest(
        format=shards.FORMAT,
        kind=kind,
        classes=list(plan.classes),
        shards=made,
        quarantined={split: sum(1 for s, _ in quarantined if s == split) for split in {s.split for s in made}},
        made_by=config.provenance(settings),
    )
    store = shards.commit(settings.tokens, manifest)
    seconds = time.perf_counter() - started
    return {
        "tokens": settings.tokens,
        "manifest_sha256": store.sha256,
        "splits": {split: manifest.rows(split) for split in manifest.splits},
        "classes": len(plan.classes),
        "images": n_images,
        "token_count": n_images * kind.n_positions,
        "bytes": sum(shard.bytes for shard in made),
        "quarantined": len(quarantined),
        "images_per_second": round(n_images / seconds, 1),
        "seconds": round(seconds, 2),
    }


class MakeShard:
    """(unit, view) -> (shard, images left out): one unit in, one Parquet object out.

    A shard that is already there is kept if it says it was made from the same unit in the same way (and, where a
    manifest has named it before, if its hash is still the same).
    """

    def __init__(self, root: str, kind: Kind, pixels: config.Pixels, committed: dict[str, str]):
        self.root = root
        self.kind = kind
        self.pixels = pixels
        self.committed = committed
        self.palette = Palette.load(storage.join(root, "palette.npy"))

    def __call__(self, task: tuple[Unit, int]) -> tuple[Shard, list[Quarantined]]:
        unit, view = task
        bad_uri = storage.join(self.root, "quarantine", f"{unit.split}-{unit.name}-v{view}.json")
        data = self._there(unit, view)
        if data is not None:
            bad = QUARANTINE.validate_json(storage.read(bad_uri))
        else:
            data, bad = self.make(unit, view)
            storage.write(bad_uri, QUARANTINE.dump_json(bad))  # first: a shard that is there has its quarantine list
            storage.write(storage.join(self.root, path_of(unit, view)), data)
        shard = Shard(
            path=path_of(unit, view),
            split=unit.split,
            view=view,
            rows=shards.parse(data).num_rows,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            source=unit.digest,
        )
        return shard, bad

    def make(self, unit: Unit, view: int) -> tuple[bytes, list[Quarantined]]:
        """The shard's bytes, and what could not be read."""
        keys, labels, tokens, bad = [], [], [], []
        for image in sources.read(unit):
            if isinstance(image, Unreadable):
                bad.append(Quarantined(key=image.key, reason=image.reason))
                continue
            try:
                rgb = view_of(image.data, self.pixels, unit.split, image.key, view)
            except ImageError as error:
                bad.append(Quarantined(key=image.key, reason=str(error)))
                continue
            keys.append(image.key)
            labels.append(image.label)
            tokens.append(self.palette.encode(rgb).reshape(-1))
        stacked = np.stack(tokens) if tokens else np.empty((0, self.kind.n_positions), np.uint16)
        return shards.encode(keys, labels, stacked, self.kind, self._about(unit, view)), bad

    def _there(self, unit: Unit, view: int) -> bytes | None:
        try:
            data = storage.read(storage.join(self.root, path_of(unit, view)))
        except NotFound:
            return None
        sha256 = self.committed.get(path_of(unit, view))
        if sha256 is not None:
            return data if hashlib.sha256(data).hexdigest() == sha256 else None
        try:
            said = shards.about(shards.parse(data))
        except Exception:  # pyarrow has many ways to say "damaged"; all of them mean: make it again
            return None
        expected = {"format": shards.FORMAT, **self.kind.model_dump(), **self._about(unit, view)}
        return data if said == expected else None

    def _about(self, unit: Unit, view: int) -> dict[str, str]:
        return {
            "unit": unit.name,
            "split": unit.split,
            "view": _view_name(self.pixels, unit.split, view),
            "source": unit.digest,
        }


def path_of(unit: Unit, view: int) -> str:
    return f"{unit.split}/{unit.name}-v{view}.parquet"


def view_of(data: bytes, pixels: config.Pixels, split: str, key: str, view: int) -> images.RGB:
    """Encoded bytes -> (n_px, n_px, 3): random crops for training views if asked for, the centre otherwise."""
    pipeline = images.PIPELINES[pixels.pipeline]
    if split == TRAIN and pixels.crop == "random":
        return images.random_view(data, pixels.n_px, key, view, pipeline)
    return images.centre_view(data, pixels.n_px, pipeline)


def _view_name(pixels: config.Pixels, split: str, view: int) -> str:
    return f"random-{view}" if split == TRAIN and pixels.crop == "random" else "centre"


def _load_palette(uri: str, pipeline: str) -> Palette:
    """The palette, refused if its sidecar says it was fitted on pixels of another pipeline."""
    palette = Palette.load(uri)
    if uri == config.OPENAI_PALETTE:
        return palette  # of pixels that nobody can make again; the store names the pipeline it is used with
    try:
        fitted_on = json.loads(storage.read(_sidecar(uri)))["pipeline"]
    except NotFound:
        return palette  # a palette from elsewhere has no sidecar
    if fitted_on != pipeline:
        raise PaletteError(f"{uri} was fitted on pixels of {fitted_on!r}, not {pipeline!r}: see --pixels.pipeline")
    return palette


def _committed(root: str, kind: Kind, tasks: list[tuple[Unit, int]]) -> dict[str, str]:
    """Path -> sha256 of a store that is already committed here; refused if it is not the one now asked for."""
    if not storage.exists(storage.join(root, "manifest.json")):
        return {}
    manifest = TokenStore.open(root).manifest
    for field in Kind.model_fields:
        there, asked = getattr(manifest.kind, field), getattr(kind, field)
        if there != asked:
            raise TokenStoreError(
                f"the token store committed at {root} has {field} {there}, not {asked}: choose another --tokens"
            )
    if {s.path: s.source for s in manifest.shards} != {path_of(unit, view): unit.digest for unit, view in tasks}:
        raise TokenStoreError(
            f"the token store committed at {root} was made from another listing (images, views or"
            " shard size differ): choose another --tokens"
        )
    return {shard.path: shard.sha256 for shard in manifest.shards}


def _check_budget(quarantined: list[tuple[str, Quarantined]], n_images: int, settings: config.Prepare) -> None:
    if len(quarantined) > settings.budget * n_images:
        split, first = quarantined[0]
        raise SourceError(
            f"{len(quarantined)} of {n_images} images cannot be read, more than the budget of"
            f" {settings.budget:.2%}; the first is {split}: {first.key}: {first.reason}. All are listed below"
            f" {settings.tokens}/quarantine: mend or remove them, or raise --budget"
        )
