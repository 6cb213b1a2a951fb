"""The work units of `score` and `complete`: their images, their fingerprints and their cached Parquet files."""

import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from igpt_ray import storage, weights
from igpt_ray.data import pixels, sources
from igpt_ray.data.decoding import decode
from igpt_ray.data.palette import Palette
from igpt_ray.data.sources import UnreadableImage, WorkUnit
from igpt_ray.data.sources.units import TEST
from igpt_ray.data.token_format import TokenFormat, Tokens
from igpt_ray.data.token_store import Shard, TokenStore, tokens_of
from igpt_ray.errors import ImageError, NotFound, SettingError, SourceError
from igpt_ray.evaluate.config import ScoreConfig
from igpt_ray.generate.config import BatchConfig, CompleteConfig
from igpt_ray.serve.client import Client

KEY = "IGPT_KEY"
"""The environment variable with the API key of a server."""
AT_ONCE = 16
"""Concurrent requests of a worker to a server."""


class Rows(NamedTuple):
    """The images of a unit: token rows, or encoded files for a server that reads images itself."""

    keys: list[str]
    labels: list[int]
    pictures: list[Tokens] | list[bytes]
    unreadable: dict[str, str]
    """Key -> reason."""


class BatchPlan(NamedTuple):
    """The token format, the weights and the work units of a command, known before any worker starts."""

    kind: TokenFormat
    sha256: str
    """sha256 of the weights."""
    units: list[Shard] | list[WorkUnit]


Settings = TypeVar("Settings", bound=BatchConfig)


def plan_batch(settings: Settings) -> tuple[Settings, BatchPlan]:
    """Check that model, store and split fit together, before any worker starts. The settings returned name the split.

    Raises `SourceError` or `TokenStoreError` if the split does not exist, `SettingError` if none is chosen by default.
    """
    if settings.endpoint:
        server = make_client(settings)
        kind, sha256 = server.token_format(), server.model_info()["sha256"]
    else:
        release = weights.load_config(settings.release)
        weights.check_next(release, settings.release)
        kind, sha256 = release.kind, release.sha256
    if settings.tokens:
        store = TokenStore.open(settings.tokens)
        owner = "the release" if settings.release else f"the model at {settings.endpoint}"
        weights.check_kind(kind, store.kind, settings.tokens, owner)
        settings = _with_split(settings, store.manifest.splits)
        return settings, BatchPlan(kind, sha256, store.manifest.select(str(settings.split)))
    plan = sources.plan(settings.source, settings.unit_images, settings.layout, settings.columns)
    splits = sorted({unit.split for unit in plan.units})
    settings = _with_split(settings, splits)
    units = [unit for unit in plan.units if unit.split == settings.split]
    if not units:
        raise SourceError(
            f"{settings.source} has no split {settings.split!r}: it has {', '.join(splits) or 'no images'}"
        )
    return settings, BatchPlan(kind, sha256, units)


def _with_split(settings: Settings, splits: list[str]) -> Settings:
    if settings.split is not None:
        return settings
    default = TEST if TEST in splits else splits[0] if len(splits) == 1 else None
    if default is None:
        raise SettingError(f"{settings.tokens or settings.source} has the splits {', '.join(splits)}: choose --split")
    return settings.model_copy(update={"split": default})


def make_client(settings: BatchConfig) -> Client:
    return Client(settings.endpoint, os.environ.get(KEY, ""), settings.model)


class UnitReader:
    """Reads the images of a unit; loads the palette where this worker converts pixels to tokens."""

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
        rows = Rows([], [], [], {})
        for image in sources.read(unit):
            if isinstance(image, UnreadableImage):
                rows.unreadable[image.key] = image.reason
                continue
            try:
                picture: Any = image.data if self.palette is None else self.tokens(image.data)
            except ImageError as error:
                rows.unreadable[image.key] = str(error)
                continue
            rows.keys.append(image.key)
            rows.labels.append(image.label)
            rows.pictures.append(picture)
        return rows

    def tokens(self, data: bytes) -> Tokens:
        assert self.palette is not None
        view = decode(pixels.centre_view, data, self.kind.n_px, self.kind.pipeline)
        return self.palette.encode(view).reshape(-1)


def unit_path(settings: ScoreConfig | CompleteConfig, unit: Shard | WorkUnit) -> str:
    name = unit.path if isinstance(unit, Shard) else f"{unit.split}/{unit.name}.parquet"
    return storage.join(settings.out, name)


def fingerprint(request: BatchPlan, unit: Shard | WorkUnit) -> str:
    """Identifies the weights and the images, by content where a digest of the content is known."""
    return f"{request.sha256} {unit.sha256 if isinstance(unit, Shard) else unit.digest}"


def cached(
    uri: str, mark: str, make: Callable[[], pa.Table], drawn: Callable[[pa.Table, str], None] | None = None
) -> pa.Table:
    """The table at `uri` if it is intact and has this fingerprint; otherwise compute, draw and write it."""
    try:
        table = pq.read_table(io.BytesIO(storage.read(uri)), page_checksum_verification=True)
        if (table.schema.metadata or {}).get(b"made_from") == mark.encode():
            return table
    except (NotFound, pa.ArrowException, OSError):
        pass  # absent or damaged: computed again
    table = make()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), "made_from": mark})
    if drawn is not None:
        drawn(table, uri)  # before the table, which marks the unit as done
    storage.write(uri, parquet_bytes(table))
    return table


def parquet_bytes(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    return out.getvalue()
