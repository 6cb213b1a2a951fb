"""Images -> a committed token store: plan the source, compute the missing shards with a mapper, write the manifest.

A task is a work unit and a view, see `make_shard`. The store is claimed before anything is written, see `preparation`,
and the manifest is written last and commits it.
"""

import json
import logging
import math
import time
from collections import Counter, defaultdict
from itertools import islice
from typing import Any

from igpt_ray import storage
from igpt_ray.data import pixels as images
from igpt_ray.data import preparation, sources, token_store
from igpt_ray.data.config import OPENAI_PALETTE, PrepareConfig
from igpt_ray.data.make_shard import HOLDOUT, MakeShard, Task, path_of, splits_of, tasks_of
from igpt_ray.data.mapper import Mapper
from igpt_ray.data.palette import Palette, sidecar
from igpt_ray.data.sources.units import TRAIN, UNLABELLED
from igpt_ray.data.token_format import TokenFormat
from igpt_ray.data.token_store import Manifest, Quarantined, Shard, TokenStore
from igpt_ray.errors import NotFound, PaletteError, SourceError, TokenStoreError
from igpt_ray.progress import Progress
from igpt_ray.provenance import provenance

log = logging.getLogger(__name__)


def prepare(settings: PrepareConfig, mapper: Mapper) -> dict[str, Any]:
    """Write every missing shard, then the manifest. A repeat after a failure completes the store.

    Raises `TokenStoreError` if another store is committed or in preparation at the same root, `PaletteError` if the
    palette was fitted with another pixel pipeline, and `SourceError` if more images than the budget are unreadable.
    """
    started = time.perf_counter()
    pipeline = images.pipeline_id(settings.pixels.pipeline, settings.pixels.view)
    palette = _load_palette(settings.palette, pipeline)
    kind = TokenFormat(n_px=settings.pixels.n_px, n_vocab=len(palette), palette=palette.fingerprint, pipeline=pipeline)
    plan = sources.plan(settings.source, settings.shard_images, settings.layout, settings.columns)
    if settings.dry_run:
        return describe(plan)
    tasks = tasks_of(plan, settings.views)
    arguments = {
        "root": settings.tokens,
        "kind": kind,
        "pixels": settings.pixels,
        "holdout": settings.holdout,
        "committed": _committed(settings, kind, tasks),
    }
    claim = preparation.preparation_of(settings, kind, plan)
    preparation.create_or_check(settings.tokens, claim)
    palette.save(storage.join(settings.tokens, "palette.npy"))
    shards, quarantined = _make_shards(tasks, arguments, settings, mapper)
    n_images = sum(shard.rows for shard in shards)
    passed_over = _check_counts(plan, shards)
    if over_budget := _over_budget(quarantined, n_images + len(quarantined), settings):
        preparation.release(settings.tokens, claim)
        raise over_budget
    manifest = Manifest(
        format=token_store.FORMAT, kind=kind, classes=list(plan.classes), shards=shards, made_by=provenance(settings)
    )
    preparation.create_or_check(settings.tokens, claim)
    store = token_store.commit(settings.tokens, manifest)
    _write_contact_sheets(store)
    seconds = time.perf_counter() - started
    source_bytes = sum(shard.statistics.source_bytes for shard in shards)
    return {
        "tokens": settings.tokens,
        "manifest_sha256": store.sha256,
        "splits": {split: sum(s.rows for s in shards if (s.split, s.view) == (split, 0)) for split in manifest.splits},
        "classes": len(plan.classes),
        "images": n_images,
        "token_count": n_images * kind.n_positions,
        "bytes": sum(shard.bytes for shard in shards),
        "psnr_db": _psnr_db(shards, kind),
        "quarantined": len(quarantined),
        "passed_over": passed_over,
        "images_per_second": round(n_images / seconds, 1),
        "mb_per_second": round(source_bytes / seconds / 1e6, 1),
        "seconds": round(seconds, 2),
    }


def _make_shards(
    tasks: list[Task], arguments: dict[str, Any], settings: PrepareConfig, mapper: Mapper
) -> tuple[list[Shard], list[tuple[str, Quarantined]]]:
    """The shards of all tasks in the order of the manifest, and the unreadable images with their splits."""
    shards: list[Shard] = []
    quarantined: list[tuple[str, Quarantined]] = []
    progress = Progress("prepare", sum(task.unit.images for task in tasks), "images")  # estimated for archives
    for result in mapper(tasks, MakeShard, arguments, settings.pool):
        for shard, unreadable in result.shards:
            shards.append(shard)
            quarantined += [(shard.split, image) for image in unreadable]
        progress.add(result.n_planned, f"{len(quarantined)} quarantined", result.reused)
    shards.sort(key=lambda shard: (shard.split, shard.view, shard.path))
    return shards, quarantined


EXAMPLES = 3
"""Images of each split that a dry run names."""


def describe(plan: sources.Plan) -> dict[str, Any]:
    """What a dry run prints. Reads, but does not decode, the first images of each split."""
    splits: dict[str, dict[str, Any]] = {}
    for unit in plan.units:
        split = splits.setdefault(unit.split, {"images": 0, "units": 0, "examples": []})
        split["images"] += unit.images
        split["units"] += 1
        if split["units"] == 1:
            for image in islice(sources.read(unit), EXAMPLES):
                label = image.label if isinstance(image, sources.Image) else UNLABELLED
                name = plan.classes[label] if label != UNLABELLED else None
                reason = {"unreadable": image.reason} if isinstance(image, sources.UnreadableImage) else {}
                split["examples"].append({"key": image.key, "class": name, **reason})
    return {
        "dry_run": True,
        "layout": plan.layout,
        "classes": len(plan.classes),
        "first_classes": list(plan.classes[:10]),
        "splits": splits,
        "passed_over": dict(plan.passed_over),
    }


def _check_counts(plan: sources.Plan, shards: list[Shard]) -> dict[str, int]:
    """Files and members that were passed over, by kind; each view of a unit counts them, so one view is taken.

    Raises `SourceError` if a view lacks images of another one.
    """
    totals: dict[tuple[str, int], int] = defaultdict(int)
    passed_over = Counter(plan.passed_over)
    for shard in shards:
        split = TRAIN if shard.split == HOLDOUT else shard.split
        totals[split, shard.view] += shard.rows + shard.statistics.quarantined
        if shard.view == 0:
            passed_over.update(shard.statistics.passed_over)
    for (split, view), total in totals.items():
        if total != totals[split, 0]:
            raise SourceError(f"view {view} of {split} has {total} images, but view 0 has {totals[split, 0]}")
    counts = ", ".join(f"{n} {kind}" for kind, n in passed_over.most_common(8)) or "none"
    quarantined = sum(shard.statistics.quarantined for shard in shards if shard.view == 0)
    listed = sum(total for (_, view), total in totals.items() if view == 0)
    log.info(
        "listed %d = %d read + %d quarantined + %d passed over (%s)",
        *(listed + passed_over.total(), listed - quarantined, quarantined, passed_over.total(), counts),
    )
    return dict(passed_over)


def _load_palette(uri: str, pipeline: str) -> Palette:
    """The palette. Raises `PaletteError` if its sidecar names another pixel pipeline."""
    palette = Palette.load(uri)
    if uri == OPENAI_PALETTE:
        return palette  # its pixels cannot be reproduced; the store records the pipeline that it is used with
    try:
        fitted_on = json.loads(storage.read(sidecar(uri)))["pipeline"]
    except NotFound:
        return palette  # a palette from elsewhere has no sidecar
    if fitted_on != pipeline:
        raise PaletteError(
            f"{uri} was fitted on pixels of {fitted_on!r}, not {pipeline!r}: {images.settings_hint(fitted_on)}, or fit"
            " another palette"
        )
    return palette


def _committed(settings: PrepareConfig, kind: TokenFormat, tasks: list[Task]) -> dict[str, str]:
    """Path -> sha256 of the shards of a committed store at this root.

    Raises `TokenStoreError` if that store differs from the requested one.
    """
    root = settings.tokens
    if not storage.exists(storage.join(root, "manifest.json")):
        return {}
    manifest = TokenStore.open(root).manifest
    for field in TokenFormat.model_fields:
        stored, requested = getattr(manifest.kind, field), getattr(kind, field)
        if stored != requested:
            raise TokenStoreError(
                f"the token store committed at {root} has {field} {stored}, not {requested}: choose another --tokens"
            )
    for field, requested in settings.model_dump(mode="json", include={"pixels", "holdout"}).items():
        stored = manifest.made_by["settings"][field]
        if stored != requested:
            raise TokenStoreError(
                f"the token store committed at {root} was made with {field} {stored}, not {requested}: choose another"
                " --tokens"
            )
    digests = {path_of(split, t): t.unit.digest for t in tasks for split in splits_of(t.unit, settings.holdout)}
    if {s.path: s.source for s in manifest.shards} != digests:
        raise TokenStoreError(
            f"the token store committed at {root} was made from another listing (images, views or shard"
            " size differ): choose another --tokens"
        )
    return {shard.path: shard.sha256 for shard in manifest.shards}


def _write_contact_sheets(store: TokenStore) -> None:
    for split in store.manifest.splits:
        if any(shard.rows for shard in store.manifest.shards if shard.split == split):
            sheet = token_store.contact_sheet(store, split)
            storage.write(storage.join(store.root, f"{split}.png"), images.png(sheet))


def _psnr_db(shards: list[Shard], kind: TokenFormat) -> float | None:
    """PSNR of the quantised pixels; None if quantisation lost nothing."""
    error = sum(shard.statistics.squared_error for shard in shards)
    values = 3 * kind.n_positions * sum(shard.rows for shard in shards)
    return round(10 * math.log10(255**2 * values / error), 2) if error else None


def _over_budget(
    quarantined: list[tuple[str, Quarantined]], n_images: int, settings: PrepareConfig
) -> SourceError | None:
    if len(quarantined) <= max(settings.budget * n_images, min(1, math.ceil(settings.budget))):
        return None
    split, first = quarantined[0]
    return SourceError(
        f"{len(quarantined)} of {n_images} images cannot be read, more than the budget of"
        f" {settings.budget:.2%}; the first is {split}: {first.key}: {first.reason}. All are listed below"
        f" {settings.tokens}/quarantine: repair or remove them, or raise --budget"
    )
