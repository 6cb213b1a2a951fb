"""Scores and completions of a split, with Ray Data: by a release or a server, of a token store or of images.

A unit of work, a shard of the store or a unit of the images' plan, becomes one file with a name that follows from it,
marked with all that it follows from: a repeat makes only what is missing, damaged or out of date. Who is asked is not
part of the mark, for a server of the same weights says the same.

    <out>/<split>/<unit>.parquet    key, label and nats; or key, label, original and completions
    <out>/<split>/<unit>.png        of completions: the first pictures of the unit
    <out>/<split>.json              of scores: the split as a whole

An image that cannot be read has a row with no nats and the reason; completions leave it out and name it.
"""

import io
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from igpt_ray import rng, storage, weights
from igpt_ray.data import pixels, sources
from igpt_ray.data.palette import Palette
from igpt_ray.data.sources import UnreadableImage, WorkUnit
from igpt_ray.data.token_store import Shard, TokenFormat, Tokens, TokenStore, evenly, tokens_of
from igpt_ray.errors import ImageError, NotFound, SettingError, SourceError
from igpt_ray.evaluate.config import ScoreConfig
from igpt_ray.evaluate.likelihood import Likelihood, image_nats
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.flows.evaluate import device
from igpt_ray.generate import sampler
from igpt_ray.generate.config import BatchConfig, CompleteConfig
from igpt_ray.generate.engine import Engine, Request
from igpt_ray.progress import Progress
from igpt_ray.provenance import provenance
from igpt_ray.serve.client import Client

log = logging.getLogger(__name__)

KEY = "IGPT_KEY"
"""The environment variable with the key for a server."""
AT_ONCE = 16
"""Requests that a worker has at a server."""
DRAWN = 32
"""Pictures of a unit that are drawn."""


class Rows(NamedTuple):
    """The pictures of a unit: as tokens; for a server that reads images itself, as files."""

    keys: list[str]
    labels: list[int]
    pictures: list[Tokens] | list[bytes]
    unreadable: dict[str, str]
    """Key -> why."""


class BaseRequest(NamedTuple):
    """What is known before work begins."""

    kind: TokenFormat
    sha256: str
    """Of the weights."""
    units: list[Shard] | list[WorkUnit]


def _asked(settings: BatchConfig) -> BaseRequest:
    """Refuses what does not fit together, before any worker starts."""
    if settings.endpoint:
        server = _client(settings)
        kind, sha256 = server.kind(), server.model_info()["sha256"]
    else:
        about = weights.load_config(settings.release)
        weights.check_next(about, settings.release)
        kind, sha256 = about.kind, about.sha256
    if settings.tokens:
        store = TokenStore.open(settings.tokens)
        who = "the release" if settings.release else f"the model at {settings.endpoint}"
        weights.check_kind(kind, store.kind, settings.tokens, who)
        return BaseRequest(kind, sha256, store.manifest.select(settings.split))
    plan = sources.plan(settings.source, settings.unit_images, settings.layout)
    units = [unit for unit in plan.units if unit.split == settings.split]
    if not units:
        there = ", ".join(sorted({unit.split for unit in plan.units}))
        raise SourceError(f"{settings.source} has no split {settings.split!r}: it has {there or 'no images'}")
    return BaseRequest(kind, sha256, units)


def _client(settings: BatchConfig) -> Client:
    return Client(settings.endpoint, os.environ.get(KEY, ""), settings.model)


class Reading:
    """What workers of both kinds hold: the pictures' place, and the palette where pixels become tokens here."""

    def __init__(self, settings: BatchConfig, kind: TokenFormat, client: Client | None):
        self.settings = settings
        self.kind = kind
        self.client = client
        self.store = TokenStore.open(settings.tokens) if settings.tokens else None
        here = settings.source and client is None
        self.palette = Palette.load(storage.join(settings.release, "palette.npy")) if here else None

    def rows(self, unit: Shard | WorkUnit) -> Rows:
        if isinstance(unit, Shard):
            assert self.store is not None
            table = self.store.read(unit)
            return Rows(table["key"].to_pylist(), table["label"].to_pylist(), list(tokens_of(table)), {})
        found = Rows([], [], [], {})
        for image in sources.read(unit):
            if isinstance(image, UnreadableImage):
                found.unreadable[image.key] = image.reason
                continue
            try:
                picture: Any = image.data if self.palette is None else self.tokens(image.data)
            except ImageError as error:
                found.unreadable[image.key] = str(error)
                continue
            found.keys.append(image.key)
            found.labels.append(image.label)
            found.pictures.append(picture)
        return found

    def tokens(self, data: bytes) -> Tokens:
        assert self.palette is not None
        return self.palette.encode(pixels.centre_view(data, self.kind.n_px, self.kind.pipeline)).reshape(-1)


# ------------------------------------------------------------------------------------------------ scores


def score(settings: ScoreConfig) -> dict[str, Any]:
    """A Parquet file per unit with key, label and the nats of every image."""
    started = time.perf_counter()
    asked = _asked(settings)
    arguments = {"settings": settings, "asked": asked._replace(units=[]), "key": os.environ.get(KEY, "")}
    total, unreadable = Likelihood.of(np.empty(0), asked.kind.n_positions), 0
    progress = Progress("score", len(asked.units), "units")
    for table in actor_map(asked.units, ScoreUnit, arguments, settings.pool):
        nats = table["nats"].drop_null().to_numpy()
        total += Likelihood.of(nats, asked.kind.n_positions)
        unreadable += len(table) - len(nats)
        progress.add(1, f"{total.images:,} images")
    if not total.images:
        raise SourceError(f"not one image of {settings.source} could be read: {settings.out} says why")
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
    """Unit -> its table of nats, stored, made unless it is there."""

    def __init__(self, settings: ScoreConfig, asked: BaseRequest, key: str):
        self.settings, self.asked = settings, asked
        self.client = Client(settings.endpoint, key, settings.model) if settings.endpoint else None
        self.model = None if self.client else weights.load_release(settings.release, device()).model
        self.reading = Reading(settings, asked.kind, self.client)

    def __call__(self, unit: Shard | WorkUnit) -> pa.Table:
        return _once(_place(self.settings, unit), _mark(self.asked, unit), lambda: self.made(unit))

    def made(self, unit: Shard | WorkUnit) -> pa.Table:
        rows = self.reading.rows(unit)
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
        """Of every picture its nats, or None and why not."""
        none: list[str | None] = [None] * len(rows.keys)
        if not rows.keys:
            return [], []
        if self.settings.source and self.client is not None:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                said = list(pool.map(_or_error, [self.client.score_file] * len(rows.keys), rows.pictures))
            return [x if isinstance(x, float) else None for x in said], [
                x if isinstance(x, str) else None for x in said
            ]
        tokens = np.stack(rows.pictures)
        if self.client is not None:
            return self.client.score(tokens).tolist(), none
        assert self.model is not None
        return image_nats(self.model, tokens, self.settings.batch_size).tolist(), none


def _or_error(ask: Callable[..., Any], *words: Any) -> Any:
    """An answer, or in words why a picture got none."""
    try:
        return ask(*words)
    except ImageError as error:
        return str(error)


# ------------------------------------------------------------------------------------------------ completions


def complete(settings: CompleteConfig) -> dict[str, Any]:
    """Finish a few pictures of a store, or all of a split; write their tokens as Parquet, and draw given part |
    completions | original."""
    started = time.perf_counter()
    asked = _asked(settings)
    rows = _given_rows(settings, asked.kind)
    arguments = {"settings": settings, "asked": asked._replace(units=[]), "key": os.environ.get(KEY, "")}
    if settings.tokens and settings.images:
        units: list[Any] = _pick(TokenStore.open(settings.tokens), settings)
        tables = list(actor_map(units, CompleteUnit, arguments, settings.pool))
        picture = _write_few(settings, asked, pa.concat_tables(tables))
        done = [(len(table), 0) for table in tables]
    else:
        done, progress = [], Progress("complete", len(asked.units), "units")
        for part in actor_map(asked.units, CompleteUnit, arguments, settings.pool):
            done.append(part)
            progress.add(1, f"{sum(images for images, _ in done):,} images")
        picture = storage.join(settings.out, settings.split)
    n_images, unreadable = (sum(column) for column in zip(*done, strict=True))
    n_tokens = n_images * settings.n * (asked.kind.n_px - rows) * asked.kind.n_px
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
    """A picture of a store that was picked, and which of them it is."""

    number: int
    key: str
    tokens: Tokens


class CompleteUnit:
    """Few -> the table of its completions. Unit -> how many images it has, and how many could not be read: its table
    is stored, and drawn, unless it is there."""

    def __init__(self, settings: CompleteConfig, asked: BaseRequest, key: str):
        self.settings, self.asked = settings, asked
        self.rows = _given_rows(settings, asked.kind)
        self.client = Client(settings.endpoint, key, settings.model) if settings.endpoint else None
        self.reading = Reading(settings, asked.kind, self.client)
        if self.client is None:
            self.engine = Engine(weights.load_release(settings.release, device()).model, settings.slots)

    def __call__(self, unit: Shard | WorkUnit | Few) -> Any:
        if isinstance(unit, Few):
            return self.table([unit.key], [-1], [unit.tokens], [_seeds(self.settings, unit.number)])[0]
        place = _place(self.settings, unit)
        words = self.settings.model_dump(include={"n", "temperature", "top_k", "top_p", "seed"})
        mark = f"{_mark(self.asked, unit)} {self.rows} {json.dumps(words, sort_keys=True)}"
        table = _once(place, mark, lambda: self.made(unit), drawn=self.draw)
        return len(table), int(table.schema.metadata.get(b"unreadable", b"0"))

    def made(self, unit: Shard | WorkUnit) -> pa.Table:
        rows = self.reading.rows(unit)
        seeds = [_seeds(self.settings, key) for key in rows.keys]
        table, refused = self.table(rows.keys, rows.labels, rows.pictures, seeds)
        unreadable = rows.unreadable | refused
        for key, reason in unreadable.items():
            log.warning("%s cannot be read: %s", key, reason)
        return table.replace_schema_metadata({"unreadable": str(len(unreadable)), "reasons": json.dumps(unreadable)})

    def table(
        self, keys: list[str], labels: list[int], pictures: Any, seeds: list[list[int]]
    ) -> tuple[pa.Table, dict[str, str]]:
        """Of the pictures that can be read; and the others by key, with the reason."""
        answers = self.asked_of_server(pictures, seeds) if self.client else self.generated(pictures, seeds)
        refused = {key: one for key, one in zip(keys, answers, strict=True) if isinstance(one, str)}
        kept = [i for i, one in enumerate(answers) if not isinstance(one, str)]
        T, n = self.asked.kind.n_positions, self.settings.n
        originals = np.array([answers[i][0] for i in kept], np.uint16).reshape(-1, T)
        done = np.array([answers[i][1] for i in kept], np.uint16).reshape(-1, n, T)
        columns = {
            "key": pa.array([keys[i] for i in kept], pa.string()),
            "label": pa.array([labels[i] for i in kept], pa.int32()),
            "original": _tensor(originals),
            "completions": _tensor(done),
        }
        return pa.table(columns), refused

    def generated(self, pictures: list[Tokens], seeds: list[list[int]]) -> list[Any]:
        s, T = self.settings, self.asked.kind.n_positions
        given = np.arange(T) < self.rows * self.asked.kind.n_px
        tickets = [
            self.engine.submit(Request(tokens, given, tuple(own), s.temperature, s.top_k, s.top_p))
            for tokens, own in zip(pictures, seeds, strict=True)
        ]
        while not all(ticket.finished for ticket in tickets):
            self.engine.step()
        return [(tokens, ticket.tokens) for tokens, ticket in zip(pictures, tickets, strict=True)]

    def asked_of_server(self, pictures: Any, seeds: list[list[int]]) -> list[Any]:
        assert self.client is not None
        s, client = self.settings, self.client
        words = {"rows": self.rows, "temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda x, own: _or_error(lambda: client.complete(x, own, **words)), pictures, seeds))

    def draw(self, table: pa.Table, place: str) -> None:
        if len(table):
            figure = _figure(_palette(self.settings, self.client), self.rows, table[:DRAWN])
            storage.write(f"{place.removesuffix('.parquet')}.png", figure)


def _given_rows(settings: CompleteConfig, kind: TokenFormat) -> int:
    rows = kind.n_px // 2 if settings.rows is None else settings.rows
    if rows > kind.n_px:
        raise SettingError(f"{rows} rows are given; a picture has {kind.n_px}")
    return rows


def _pick(store: TokenStore, settings: CompleteConfig) -> list[Few]:
    """Pictures spread evenly over a split."""
    wanted = evenly(store.manifest.rows(settings.split), settings.images)
    found, start = list[Few](), 0
    for shard in store.manifest.select(settings.split):
        here = wanted[(wanted >= start) & (wanted < start + shard.rows)] - start
        start += shard.rows
        if len(here):
            table = store.read(shard)
            tokens = tokens_of(table)
            found += [Few(len(found) + i, table["key"][int(at)].as_py(), tokens[at]) for i, at in enumerate(here)]
    return found


def _seeds(settings: CompleteConfig, picture: int | str) -> list[int]:
    """One stream per sample, a function of the seed, the picture's number or key, and the sample's."""
    return [rng.seed_of(settings.seed, picture, i) for i in range(settings.n)]


def _write_few(settings: CompleteConfig, asked: BaseRequest, table: pa.Table) -> str:
    rows = _given_rows(settings, asked.kind)
    said = {"igpt_ray": json.dumps({"given": rows * asked.kind.n_px, **provenance(settings)})}
    table = table.drop_columns("label").replace_schema_metadata(said)
    storage.write(storage.join(settings.out, "completions.parquet"), _parquet(table))
    picture = storage.join(settings.out, "completions.png")
    palette = _palette(settings, _client(settings) if settings.endpoint else None)
    storage.write(picture, _figure(palette, rows, table))
    return picture


def _figure(palette: Palette, rows: int, table: pa.Table) -> bytes:
    originals, done = (table[name].combine_chunks().to_numpy_ndarray() for name in ("original", "completions"))
    return pixels.png(sampler.figure(palette, originals, done, rows))


def _palette(settings: CompleteConfig, client: Client | None) -> Palette:
    """Of the release, or else the store; a server tells its colours as they are shown, which is enough to draw."""
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


# ------------------------------------------------------------------------------------------------ files


def _place(settings: ScoreConfig | CompleteConfig, unit: Shard | WorkUnit) -> str:
    name = unit.path if isinstance(unit, Shard) else f"{unit.split}/{unit.name}.parquet"
    return storage.join(settings.out, name)


def _mark(asked: BaseRequest, unit: Shard | WorkUnit) -> str:
    """The weights, and the pictures, by content as far as their place tells it."""
    return f"{asked.sha256} {unit.sha256 if isinstance(unit, Shard) else unit.digest}"


def _once(
    uri: str, mark: str, make: Callable[[], pa.Table], drawn: Callable[[pa.Table, str], None] | None = None
) -> pa.Table:
    """The table at `uri` if it is there, whole, and marked so; otherwise made, marked, drawn and written."""
    try:
        table = pq.read_table(io.BytesIO(storage.read(uri)), page_checksum_verification=True)
        if (table.schema.metadata or {}).get(b"made_from") == mark.encode():
            return table
    except (NotFound, pa.ArrowException, OSError):
        pass  # absent or damaged: either way it is made again
    table = make()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), "made_from": mark})
    if drawn is not None:
        drawn(table, uri)  # before the table, which says that all is done
    storage.write(uri, _parquet(table))
    return table


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    return out.getvalue()
