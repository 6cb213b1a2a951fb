"""Scores and completions of a split with Ray Data: by a release or a server, of a token store or of images.

Each unit of work, a shard of the store or a unit of the images' plan, becomes one file, whose name follows from the
unit. A fingerprint of the inputs is stored in the file: a repeated command computes only the files that are missing,
damaged or out of date. The fingerprint does not depend on whether a release or a server with the same weights is used.

    <out>/<split>/<unit>.parquet    key, label and nats; or key, label, original and completions
    <out>/<split>/<unit>.png        completions: the first images of the unit
    <out>/<split>.json              scores: the whole split

An image that cannot be read has a row with no nats and the reason; completions omit it and log the reason.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from igpt_ray import rng, storage, weights
from igpt_ray.data import pixels
from igpt_ray.data.palette import Palette
from igpt_ray.data.sources import WorkUnit
from igpt_ray.data.token_format import TokenFormat, Tokens
from igpt_ray.data.token_store import Shard, TokenStore, evenly, tokens_of
from igpt_ray.errors import ImageError, SettingError, SourceError
from igpt_ray.evaluate.config import ScoreConfig
from igpt_ray.evaluate.likelihood import Likelihood, image_nats
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.flows.batch_units import (
    AT_ONCE,
    KEY,
    BatchPlan,
    Rows,
    UnitReader,
    cached,
    fingerprint,
    make_client,
    parquet_bytes,
    plan_batch,
    unit_path,
)
from igpt_ray.flows.device import assigned_device
from igpt_ray.generate import completion
from igpt_ray.generate.config import CompleteConfig
from igpt_ray.generate.engine import Engine, Request
from igpt_ray.progress import Progress
from igpt_ray.provenance import provenance
from igpt_ray.serve.client import Client

log = logging.getLogger(__name__)

DRAWN = 32
"""Images per unit in a figure."""


# ------------------------------------------------------------------------------------------------ scores


def score(settings: ScoreConfig) -> dict[str, Any]:
    """Write one Parquet file per unit, with key, label and nats of every image. Returns the totals of the split."""
    started = time.perf_counter()
    settings, request = plan_batch(settings)
    arguments = {"settings": settings, "request": request._replace(units=[]), "key": os.environ.get(KEY, "")}
    total, unreadable = Likelihood.of(np.empty(0), request.kind.n_positions), 0
    progress = Progress("score", len(request.units), "units")
    for table in actor_map(request.units, ScoreUnit, arguments, settings.pool):
        nats = table["nats"].drop_null().to_numpy()
        total += Likelihood.of(nats, request.kind.n_positions)
        unreadable += len(table) - len(nats)
        progress.add(1, f"{total.images:,} images")
    if not total.images:
        raise SourceError(f"not one image of {settings.source} could be read: the reasons are in {settings.out}")
    report: dict[str, Any] = {
        "release": settings.release or settings.endpoint,
        "split": settings.split,
        "out": settings.out,
    }
    report |= total.report() | ({"unreadable": unreadable} if settings.source else {})
    storage.write(
        storage.join(settings.out, f"{settings.split}.json"),
        json.dumps({**report, "made_by": provenance(settings)}).encode(),
    )
    return {**report, "seconds": round(time.perf_counter() - started, 2)}


class ScoreUnit:
    """Computes and stores the table of nats of a unit, unless it exists."""

    def __init__(self, settings: ScoreConfig, request: BatchPlan, key: str):
        self.settings, self.request = settings, request
        self.client = Client(settings.endpoint, key, settings.model) if settings.endpoint else None
        self.model = None if self.client else weights.load_release(settings.release, assigned_device()).model
        self.reader = UnitReader(settings, request.kind, self.client)

    def __call__(self, unit: Shard | WorkUnit) -> pa.Table:
        return cached(unit_path(self.settings, unit), fingerprint(self.request, unit), lambda: self.made(unit))

    def made(self, unit: Shard | WorkUnit) -> pa.Table:
        rows = self.reader.rows(unit)
        nats, reasons = self.nats(rows)
        bad = list(rows.unreadable)
        table = {
            "key": pa.array(rows.keys + bad, pa.string()),
            "label": pa.array(rows.labels + [-1] * len(bad), pa.int32()),
            "nats": pa.array(nats + [None] * len(bad), pa.float64()),
        }
        if isinstance(unit, WorkUnit):
            table["unreadable"] = pa.array(reasons + [rows.unreadable[key] for key in bad], pa.string())
        return pa.table(table)

    def nats(self, rows: Rows) -> tuple[list[float | None], list[str | None]]:
        """The nats of every image, or None, and the reasons."""
        none: list[str | None] = [None] * len(rows.keys)
        if not rows.keys:
            return [], []
        if self.settings.source and self.client is not None:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                answers = list(pool.map(_or_error, [self.client.score_file] * len(rows.keys), rows.pictures))
            return [x if isinstance(x, float) else None for x in answers], [
                x if isinstance(x, str) else None for x in answers
            ]
        tokens = np.stack(rows.pictures)
        if self.client is not None:
            return self.client.score(tokens).tolist(), none
        assert self.model is not None
        return image_nats(self.model, tokens, self.settings.batch_size).tolist(), none


def _or_error(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `call`, or the message of its `ImageError`."""
    try:
        return call(*arguments)
    except ImageError as error:
        return str(error)


# ------------------------------------------------------------------------------------------------ completions


def complete(settings: CompleteConfig) -> dict[str, Any]:
    """Complete some images of a store, or all of a split. Writes tokens as Parquet and figures of prompt, completions
    and original."""
    started = time.perf_counter()
    settings, request = plan_batch(settings)
    rows = _given_rows(settings, request.kind)
    arguments = {"settings": settings, "request": request._replace(units=[]), "key": os.environ.get(KEY, "")}
    if settings.tokens and settings.images:
        units: list[Any] = _pick(TokenStore.open(settings.tokens), settings)
        tables = list(actor_map(units, CompleteUnit, arguments, settings.pool))
        picture = _write_few(settings, request, pa.concat_tables(tables))
        done = [(len(table), 0) for table in tables]
    else:
        done, progress = [], Progress("complete", len(request.units), "units")
        for part in actor_map(request.units, CompleteUnit, arguments, settings.pool):
            done.append(part)
            progress.add(1, f"{sum(images for images, _ in done):,} images")
        picture = storage.join(settings.out, str(settings.split))
    n_images, unreadable = (sum(column) for column in zip(*done, strict=True))
    n_tokens = n_images * settings.n * (request.kind.n_px - rows) * request.kind.n_px
    seconds = time.perf_counter() - started
    return {
        "figure": picture,
        "images": n_images,
        **({"unreadable": unreadable} if settings.source else {}),
        "completions": n_images * settings.n,
        "sampled_tokens": n_tokens,
        "tokens_per_second": round(n_tokens / seconds, 1),
        "seconds": round(seconds, 2),
    }


class Few(NamedTuple):
    """A selected image of a store, with its index in the selection."""

    number: int
    key: str
    tokens: Tokens


class CompleteUnit:
    """Returns the table of completions of a selected image. For a unit, stores table and figure unless they exist, and
    returns the numbers of readable and unreadable images."""

    def __init__(self, settings: CompleteConfig, request: BatchPlan, key: str):
        self.settings, self.request = settings, request
        self.rows = _given_rows(settings, request.kind)
        self.client = Client(settings.endpoint, key, settings.model) if settings.endpoint else None
        self.reader = UnitReader(settings, request.kind, self.client)
        if self.client is None:
            self.engine = Engine(weights.load_release(settings.release, assigned_device()).model, settings.slots)

    def __call__(self, unit: Shard | WorkUnit | Few) -> Any:
        if isinstance(unit, Few):
            return self.table([unit.key], [-1], [unit.tokens], [_seeds(self.settings, unit.number)])[0]
        path = unit_path(self.settings, unit)
        words = self.settings.model_dump(include={"n", "temperature", "top_k", "top_p", "seed"})
        mark = f"{fingerprint(self.request, unit)} {self.rows} {json.dumps(words, sort_keys=True)}"
        table = cached(path, mark, lambda: self.made(unit), drawn=self.draw)
        return len(table), int(table.schema.metadata.get(b"unreadable", b"0"))

    def made(self, unit: Shard | WorkUnit) -> pa.Table:
        rows = self.reader.rows(unit)
        seeds = [_seeds(self.settings, key) for key in rows.keys]
        table, refused = self.table(rows.keys, rows.labels, rows.pictures, seeds)
        unreadable = rows.unreadable | refused
        for key, reason in unreadable.items():
            log.warning("%s cannot be read: %s", key, reason)
        return table.replace_schema_metadata({"unreadable": str(len(unreadable)), "reasons": json.dumps(unreadable)})

    def table(
        self, keys: list[str], labels: list[int], pictures: Any, seeds: list[list[int]]
    ) -> tuple[pa.Table, dict[str, str]]:
        """The table of the readable images, and the reason of each unreadable image by key."""
        answers = self.complete_remotely(pictures, seeds) if self.client else self.complete_locally(pictures, seeds)
        refused = {key: one for key, one in zip(keys, answers, strict=True) if isinstance(one, str)}
        kept = [i for i, one in enumerate(answers) if not isinstance(one, str)]
        T, n = self.request.kind.n_positions, self.settings.n
        originals = np.array([answers[i][0] for i in kept], np.uint16).reshape(-1, T)
        done = np.array([answers[i][1] for i in kept], np.uint16).reshape(-1, n, T)
        columns = {
            "key": pa.array([keys[i] for i in kept], pa.string()),
            "label": pa.array([labels[i] for i in kept], pa.int32()),
            "original": _tensor(originals),
            "completions": _tensor(done),
        }
        return pa.table(columns), refused

    def complete_locally(self, pictures: list[Tokens], seeds: list[list[int]]) -> list[Any]:
        s, T = self.settings, self.request.kind.n_positions
        given = np.arange(T) < self.rows * self.request.kind.n_px
        generations = [
            self.engine.submit(Request(tokens, given, tuple(own), s.temperature, s.top_k, s.top_p))
            for tokens, own in zip(pictures, seeds, strict=True)
        ]
        while not all(generation.finished for generation in generations):
            self.engine.step()
        return [(tokens, generation.tokens) for tokens, generation in zip(pictures, generations, strict=True)]

    def complete_remotely(self, pictures: Any, seeds: list[list[int]]) -> list[Any]:
        assert self.client is not None
        s, client = self.settings, self.client
        words = {"rows": self.rows, "temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda x, own: _or_error(lambda: client.complete(x, own, **words)), pictures, seeds))

    def draw(self, table: pa.Table, path: str) -> None:
        if len(table):
            figure = _figure(_palette(self.settings, self.client), self.rows, table[:DRAWN])
            storage.write(f"{path.removesuffix('.parquet')}.png", figure)


def _given_rows(settings: CompleteConfig, kind: TokenFormat) -> int:
    rows = kind.n_px // 2 if settings.rows is None else settings.rows
    if rows > kind.n_px:
        raise SettingError(f"--rows is {rows}, expected at most {kind.n_px}, the rows of an image")
    return rows


def _pick(store: TokenStore, settings: CompleteConfig) -> list[Few]:
    """Evenly spaced images of a split."""
    split = str(settings.split)
    selected = evenly(store.manifest.rows(split), settings.images)
    images, start = list[Few](), 0
    for shard in store.manifest.select(split):
        here = selected[(selected >= start) & (selected < start + shard.rows)] - start
        start += shard.rows
        if len(here):
            table = store.read(shard)
            tokens = tokens_of(table)
            images += [Few(len(images) + i, table["key"][int(at)].as_py(), tokens[at]) for i, at in enumerate(here)]
    return images


def _seeds(settings: CompleteConfig, picture: int | str) -> list[int]:
    """One seed per sample, a function of the seed, the index or key of the image, and the index of the sample."""
    return [rng.seed_of(settings.seed, picture, i) for i in range(settings.n)]


def _write_few(settings: CompleteConfig, request: BatchPlan, table: pa.Table) -> str:
    rows = _given_rows(settings, request.kind)
    metadata = {"igpt_ray": json.dumps({"given": rows * request.kind.n_px, **provenance(settings)})}
    table = table.drop_columns("label").replace_schema_metadata(metadata)
    storage.write(storage.join(settings.out, "completions.parquet"), parquet_bytes(table))
    picture = storage.join(settings.out, "completions.png")
    palette = _palette(settings, make_client(settings) if settings.endpoint else None)
    storage.write(picture, _figure(palette, rows, table))
    return picture


def _figure(palette: Palette, rows: int, table: pa.Table) -> bytes:
    originals, done = (table[name].combine_chunks().to_numpy_ndarray() for name in ("original", "completions"))
    return pixels.png(completion.figure(palette, originals, done, rows))


def _palette(settings: CompleteConfig, client: Client | None) -> Palette:
    """The palette of the release or the store; for a server its colours as 8-bit RGB, which suffices for figures."""
    if settings.release:
        return Palette.load(storage.join(settings.release, "palette.npy"))
    if settings.tokens:
        return TokenStore.open(settings.tokens).palette()
    assert client is not None
    shown = client.model_info()["palette"]
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in shown])
    return Palette((rgb / 127.5 - 1).astype(np.float32))


def _tensor(values: Tokens) -> pa.Array:
    if len(values):
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
    kind = pa.fixed_shape_tensor(pa.uint16(), values.shape[1:])
    return pa.ExtensionArray.from_storage(kind, pa.array([], kind.storage_type))
