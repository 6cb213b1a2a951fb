"""Images -> palette -> token shards, with Ray Data.

`fit_palette`: units -> histogram of prepared pixels, summed on the driver (2^24 counts) -> faiss.
`prepare`:     units x views -> one shard each, on actors -> manifest, written last.
"""

import functools
import hashlib
import json
import logging
import math
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from igpt_ray import storage
from igpt_ray.data import pixels as images
from igpt_ray.data import sources, token_store
from igpt_ray.data.config import OPENAI_PALETTE, PaletteConfig, PixelsConfig, PrepareConfig
from igpt_ray.data.image_files import RGB
from igpt_ray.data.palette import COLOURS, Palette, pack, quality, swatches
from igpt_ray.data.sources import TRAIN, KeyFilter, UnreadableImage, WorkUnit
from igpt_ray.data.token_store import Manifest, Quarantined, Shard, Statistics, TokenFormat, TokenStore
from igpt_ray.errors import ImageError, NotFound, PaletteError, SourceError, TokenStoreError
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.provenance import provenance

log = logging.getLogger(__name__)

PALETTE_UNIT = 1000
"""Images per task while sampling pixels."""
TOGETHER = 64
"""Images whose pixels are looked up at once."""
HOLDOUT = "holdout"

QUARANTINE = TypeAdapter(list[Quarantined])

# ------------------------------------------------------------------------------------------------ palette


def fit_palette(settings: PaletteConfig) -> dict[str, Any]:
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
    for counted in actor_map(units, CountColours, arguments, settings.pool):
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
    storage.write(_sidecar(settings.out), json.dumps({**report, "made_by": provenance(settings)}).encode())
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

    def __init__(self, pixels: PixelsConfig, fraction: float, seed: int):
        self.pixels = pixels
        self.wanted = functools.partial(sources.sampled, fraction=fraction, seed=seed)

    def __call__(self, unit: WorkUnit) -> Counted:
        pixels, unreadable = [], 0
        for image in sources.read(unit, self.wanted):
            if isinstance(image, UnreadableImage):
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


def prepare(settings: PrepareConfig) -> dict[str, Any]:
    """Write every shard that is not there yet, then the manifest. A repeat completes what is missing."""
    started = time.perf_counter()
    pipeline = images.PIPELINES[settings.pixels.pipeline]
    palette = _load_palette(settings.palette, pipeline)
    kind = TokenFormat(n_px=settings.pixels.n_px, n_vocab=len(palette), palette=palette.fingerprint, pipeline=pipeline)
    plan = sources.plan(settings.source, settings.shard_images, settings.layout)
    tasks = tasks_of(plan, settings.views)
    committed = _committed(settings, kind, tasks)
    palette.save(storage.join(settings.tokens, "palette.npy"))
    made: list[Shard] = []
    quarantined: list[tuple[str, Quarantined]] = []
    arguments = {
        "root": settings.tokens,
        "kind": kind,
        "pixels": settings.pixels,
        "holdout": settings.holdout,
        "committed": committed,
    }
    progress = Progress(tasks)
    for done in actor_map(tasks, MakeShard, arguments, settings.pool):
        for shard, bad in done.shards:
            made.append(shard)
            quarantined += [(shard.split, image) for image in bad]
        log.info("%s", progress.add(done))
    made.sort(key=lambda shard: (shard.split, shard.view, shard.path))
    n_images = sum(shard.rows for shard in made)
    _check_budget(quarantined, n_images + len(quarantined), settings)
    manifest = Manifest(
        format=token_store.FORMAT, kind=kind, classes=list(plan.classes), shards=made, made_by=provenance(settings)
    )
    store = token_store.commit(settings.tokens, manifest)
    for split in manifest.splits:
        if any(shard.rows for shard in made if shard.split == split):
            sheet = token_store.contact_sheet(store, split)
            storage.write(storage.join(settings.tokens, f"{split}.png"), images.png(sheet))
    seconds = time.perf_counter() - started
    source_bytes = sum(shard.statistics.source_bytes for shard in made)
    return {
        "tokens": settings.tokens,
        "manifest_sha256": store.sha256,
        "splits": {split: sum(s.rows for s in made if (s.split, s.view) == (split, 0)) for split in manifest.splits},
        "classes": len(plan.classes),
        "images": n_images,
        "token_count": n_images * kind.n_positions,
        "bytes": sum(shard.bytes for shard in made),
        "psnr_db": _psnr_db(made, kind),
        "quarantined": len(quarantined),
        "images_per_second": round(n_images / seconds, 1),
        "mb_per_second": round(source_bytes / seconds / 1e6, 1),
        "seconds": round(seconds, 2),
    }


class Task(NamedTuple):
    """What an actor is handed: a unit of work, cropped for the view-th time."""

    unit: WorkUnit
    view: int


def tasks_of(plan: sources.Plan, views: int) -> list[Task]:
    tasks = [Task(unit, view) for unit in plan.units for view in range(views if unit.split == TRAIN else 1)]
    return sorted(tasks, key=lambda task: (task.unit.split, task.view, task.unit.name))


def splits_of(unit: WorkUnit, holdout: float) -> list[str]:
    """The splits that a unit's images go to; each gets a shard of its own."""
    return [TRAIN, HOLDOUT] if unit.split == TRAIN and holdout else [unit.split]


def held_out(key: str, holdout: float) -> bool:
    """Whether an image belongs to the hold-out: by its key alone, so that no listing, view or repeat changes it, and
    an image that occurs twice is never on both sides."""
    return sources.sampled(f"{HOLDOUT}\0{key}", holdout, seed=0)


class Made(NamedTuple):
    """A shard's bytes, and what could not be read."""

    data: bytes
    bad: list[Quarantined]


class Done(NamedTuple):
    """What comes back: each shard, and the images left out of it."""

    planned: int
    """Images the unit was thought to have."""
    shards: list[tuple[Shard, list[Quarantined]]]
    kept: bool
    """Nothing was made, all was there."""


class Progress:
    """A line a task: how far, how fast, how long still. What was there already says nothing about the speed."""

    def __init__(self, tasks: list[Task]):
        self.tasks, self.tasks_done = len(tasks), 0
        self.images_left = sum(task.unit.images for task in tasks)  # an estimate, where archives hold them
        self.images, self.quarantined = 0, 0
        self.made, self.made_bytes = 0, 0
        self.started = time.perf_counter()

    def add(self, done: Done) -> str:
        found = [shard for shard, _ in done.shards]
        rows, bad = sum(shard.rows for shard in found), sum(shard.statistics.quarantined for shard in found)
        self.tasks_done += 1
        self.images_left -= done.planned
        self.images += rows
        self.quarantined += bad
        if not done.kept:
            self.made += rows + bad
            self.made_bytes += sum(shard.statistics.source_bytes for shard in found)
        seconds = time.perf_counter() - self.started
        rate = self.made / seconds
        line = f"{self.tasks_done} of {self.tasks} units, {self.images} images, {self.quarantined} in quarantine"
        if rate:
            line += f", {rate:.0f} images/s, {self.made_bytes / seconds / 1e6:.0f} MB/s"
            line += f", {max(0, self.images_left) / rate:.0f} s left"
        return line


class MakeShard:
    """Task -> shards and images left out: one unit in, one Parquet object out, or two if a part is held out.

    A shard that is already there is kept if it says it was made from the same unit in the same way and is whole: by the
    hash in the manifest that names it, or, before the commit, to the last bit of what its rows would be written as.
    """

    def __init__(self, root: str, kind: TokenFormat, pixels: PixelsConfig, holdout: float, committed: dict[str, str]):
        self.root = root
        self.kind = kind
        self.pixels = pixels
        self.holdout = holdout
        self.committed = committed
        self.palette = Palette.load(storage.join(root, "palette.npy"))

    def __call__(self, task: Task) -> Done:
        splits = splits_of(task.unit, self.holdout)
        there = {split: found for split in splits if (found := self._there(task, split)) is not None}
        made = self.make(task) if len(there) < len(splits) else {}
        listed = []
        for split in splits:
            data, bad = there[split] if split in there else made[split]
            if split not in there:
                # First the list: a shard that is there has its quarantine list.
                storage.write(quarantine_uri(self.root, split, task), QUARANTINE.dump_json(bad))
                storage.write(storage.join(self.root, path_of(split, task)), data)
            listed.append((self._listing(task, split, data), bad))
        return Done(task.unit.images, listed, kept=not made)

    def make(self, task: Task, wanted: KeyFilter | None = None) -> dict[str, Made]:
        """For each split the shard and what could not be read, of the images whose key is `wanted`, or of all."""
        parts = {split: _Part(self.palette, self.kind) for split in splits_of(task.unit, self.holdout)}
        for image in sources.read(task.unit, wanted):
            part = parts[HOLDOUT if HOLDOUT in parts and held_out(image.key, self.holdout) else task.unit.split]
            if isinstance(image, UnreadableImage):
                part.leave_out(image.key, image.reason)
                continue
            try:
                part.add(image, view_of(image.data, self.pixels, task.unit.split, image.key, task.view))
            except ImageError as error:
                part.leave_out(image.key, str(error))
        return {split: Made(part.shard(self._about(task, split)), part.bad) for split, part in parts.items()}

    def _there(self, task: Task, split: str) -> Made | None:
        """What would be made, if it is there and whole to the last bit; an uncommitted shard has no hash but itself."""
        path = path_of(split, task)
        try:
            data = storage.read(storage.join(self.root, path))
            bad = QUARANTINE.validate_json(storage.read(quarantine_uri(self.root, split, task)))
        except (NotFound, ValidationError):
            return None
        if path in self.committed:
            return Made(data, bad) if hashlib.sha256(data).hexdigest() == self.committed[path] else None
        try:
            said = token_store.about((table := token_store.parse(data)).schema)
            statistics = said.pop("statistics")
            if said != {"format": token_store.FORMAT, **self.kind.model_dump(), **self._about(task, split)}:
                return None
            again = token_store.reencode(table)
        except Exception:  # pyarrow has many ways to say "damaged"; all of them mean: make it again
            return None
        if again != data or statistics["quarantined"] != len(bad):
            return None
        if bad and self.make(task, {image.key for image in bad}.__contains__)[split].bad != bad:
            return None  # what could not be read has been mended since
        return Made(data, bad)

    def _listing(self, task: Task, split: str, data: bytes) -> Shard:
        rows, said = token_store.described(data)
        return Shard(
            path=path_of(split, task),
            split=split,
            view=task.view,
            rows=rows,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            source=task.unit.digest,
            statistics=Statistics.model_validate(said["statistics"]),
        )

    def _about(self, task: Task, split: str) -> dict[str, Any]:
        view = _view_name(self.pixels, task.unit.split, task.view)
        held = {"holdout": self.holdout} if HOLDOUT in splits_of(task.unit, self.holdout) else {}
        return {"unit": task.unit.name, "split": split, "view": view, "source": task.unit.digest, **held}


class _Part:
    """The rows of one shard as they come in. Pixels become tokens some images at a time, which costs less than one by
    one, and holds less than all at the end."""

    def __init__(self, palette: Palette, kind: TokenFormat):
        self.palette = palette
        self.kind = kind
        self.keys: list[str] = []
        self.labels: list[int] = []
        self.bad: list[Quarantined] = []
        self.source_bytes = self.squared_error = 0
        self._views: list[RGB] = []
        self._tokens = [np.empty((0, kind.n_positions), np.uint16)]

    def add(self, image: sources.Image, view: RGB) -> None:
        self.keys.append(image.key)
        self.labels.append(image.label)
        self.source_bytes += len(image.data)
        self._views.append(view)
        if len(self._views) == TOGETHER:
            self._encode()

    def leave_out(self, key: str, reason: str) -> None:
        self.bad.append(Quarantined(key=key, reason=reason))

    def shard(self, about: dict[str, Any]) -> bytes:
        if self._views:
            self._encode()
        tokens = np.concatenate(self._tokens)
        statistics = Statistics(
            quarantined=len(self.bad),
            source_bytes=self.source_bytes,
            squared_error=self.squared_error,
        )
        about = {**about, "statistics": statistics.model_dump()}
        return token_store.encode(self.keys, self.labels, tokens, self.kind, about)

    def _encode(self) -> None:
        rgb = np.stack(self._views).reshape(len(self._views), -1, 3)
        tokens = self.palette.encode(rgb)
        away = rgb.astype(np.int32) - self.palette.decode(tokens)
        self.squared_error += int(np.vdot(away, away))
        self._tokens.append(tokens)
        self._views.clear()


def path_of(split: str, task: Task) -> str:
    return f"{split}/{task.unit.name}-v{task.view}.parquet"


def quarantine_uri(root: str, split: str, task: Task) -> str:
    return storage.join(root, "quarantine", f"{split}-{task.unit.name}-v{task.view}.json")


def view_of(data: bytes, pixels: PixelsConfig, split: str, key: str, view: int) -> RGB:
    """Encoded bytes -> (n_px, n_px, 3): random crops for training views if asked for, the centre otherwise."""
    pipeline = images.PIPELINES[pixels.pipeline]
    if split == TRAIN and pixels.crop == "random":
        return images.random_view(data, pixels.n_px, key, view, pipeline)
    return images.centre_view(data, pixels.n_px, pipeline)


def _view_name(pixels: PixelsConfig, split: str, view: int) -> str:
    return f"random-{view}" if split == TRAIN and pixels.crop == "random" else "centre"


def _load_palette(uri: str, pipeline: str) -> Palette:
    """The palette, refused if its sidecar says it was fitted on pixels of another pipeline."""
    palette = Palette.load(uri)
    if uri == OPENAI_PALETTE:
        return palette  # of pixels that nobody can make again; the store names the pipeline it is used with
    try:
        fitted_on = json.loads(storage.read(_sidecar(uri)))["pipeline"]
    except NotFound:
        return palette  # a palette from elsewhere has no sidecar
    if fitted_on != pipeline:
        raise PaletteError(f"{uri} was fitted on pixels of {fitted_on!r}, not {pipeline!r}: see --pixels.pipeline")
    return palette


def _committed(settings: PrepareConfig, kind: TokenFormat, tasks: list[Task]) -> dict[str, str]:
    """Path -> sha256 of a store that is already committed here; refused if it is not the one now asked for."""
    root = settings.tokens
    if not storage.exists(storage.join(root, "manifest.json")):
        return {}
    manifest = TokenStore.open(root).manifest
    for field in TokenFormat.model_fields:
        there, asked = getattr(manifest.kind, field), getattr(kind, field)
        if there != asked:
            raise TokenStoreError(
                f"the token store committed at {root} has {field} {there}, not {asked}: choose another --tokens"
            )
    for field, asked in settings.model_dump(mode="json", include={"pixels", "holdout"}).items():
        there = manifest.made_by["settings"][field]
        if there != asked:
            raise TokenStoreError(
                f"the token store committed at {root} was made with {field} {there}, not {asked}: choose another"
                " --tokens"
            )
    asked = {path_of(split, t): t.unit.digest for t in tasks for split in splits_of(t.unit, settings.holdout)}
    if {s.path: s.source for s in manifest.shards} != asked:
        raise TokenStoreError(
            f"the token store committed at {root} was made from another listing (images, views or shard"
            " size differ): choose another --tokens"
        )
    return {shard.path: shard.sha256 for shard in manifest.shards}


def _psnr_db(made: list[Shard], kind: TokenFormat) -> float | None:
    """Of the pixels, once they are colours of the palette."""
    error = sum(shard.statistics.squared_error for shard in made)
    values = 3 * kind.n_positions * sum(shard.rows for shard in made)
    return round(10 * math.log10(255**2 * values / error), 2) if error else None


def _check_budget(quarantined: list[tuple[str, Quarantined]], n_images: int, settings: PrepareConfig) -> None:
    if len(quarantined) > settings.budget * n_images:
        split, first = quarantined[0]
        raise SourceError(
            f"{len(quarantined)} of {n_images} images cannot be read, more than the budget of"
            f" {settings.budget:.2%}; the first is {split}: {first.key}: {first.reason}. All are listed below"
            f" {settings.tokens}/quarantine: mend or remove them, or raise --budget"
        )
