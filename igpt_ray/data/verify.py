"""Compare a token store with its manifest and with its source, one shard at a time.

Every shard: bytes, sha256, metadata, rows, ranges of tokens and labels, unique keys. Some shards are computed again
from the source and compared. Files that the manifest does not name are counted, and removed on request.
"""

import logging
import time
from typing import Any

import numpy as np

from igpt_ray import storage
from igpt_ray.data import sources
from igpt_ray.data.config import PrepareConfig, VerifyConfig
from igpt_ray.data.make_shard import MakeShard, Task, path_of, splits_of, tasks_of
from igpt_ray.data.mapper import Mapper
from igpt_ray.data.sources.units import UNLABELLED
from igpt_ray.data.token_store import Shard, TokenStore, evenly, metadata, parse, tokens_of
from igpt_ray.errors import StorageError, TokenStoreError
from igpt_ray.progress import Progress

log = logging.getLogger(__name__)

SHOWN = 5
"""Problems in the error message. All problems are logged."""


def verify(settings: VerifyConfig, mapper: Mapper) -> dict[str, Any]:
    """The counts of what was checked. Raises `TokenStoreError` with the problems if there are any."""
    started = time.perf_counter()
    store = TokenStore.open(settings.tokens)
    store.palette()
    problems: list[str] = []
    checks = mapper(store.manifest.shards, CheckShard, {"tokens": settings.tokens}, settings.pool)
    progress = Progress("verify", len(store.manifest.shards), "shards")
    for shard_problems in checks:
        problems += shard_problems
        progress.add(1, f"{len(problems)} problems")
    problems += _check_against_source(store, settings, mapper)
    for problem in problems:
        log.error("%s", problem)
    if problems:
        more = f" ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise TokenStoreError(
            f"{settings.tokens} has {len(problems)} problem(s): {'; '.join(problems[:SHOWN])}{more}."
            " Delete the damaged files and repeat jobs/prepare.py"
        )
    unnamed = _unnamed(store)
    if settings.remove:
        for uri in unnamed:
            storage.delete(uri)
    return {
        "tokens": settings.tokens,
        "shards": len(store.manifest.shards),
        "images": sum(shard.rows for shard in store.manifest.shards),
        "remade": min(settings.remake, len(store.manifest.shards)),
        "unnamed_files": len(unnamed),
        "removed_files": len(unnamed) if settings.remove else 0,
        "seconds": round(time.perf_counter() - started, 2),
    }


class CheckShard:
    """Maps a shard to a list of its problems, one line each."""

    def __init__(self, tokens: str):
        self.store = TokenStore.open(tokens)

    def __call__(self, shard: Shard) -> list[str]:
        manifest = self.store.manifest
        try:
            table = self.store.read(shard)
        except (StorageError, TokenStoreError) as error:
            return [str(error)]
        stored, tokens, labels = metadata(table.schema), tokens_of(table), table["label"].to_numpy()
        problems = []
        for field, value in manifest.kind.model_dump().items():
            if stored.get(field) != value:
                problems.append(f"{field} is {stored.get(field)}, the manifest has {value}")
        if stored.get("source") != shard.source:
            problems.append("the work unit is not the one in the manifest")
        if tokens.shape != (shard.rows, manifest.kind.n_positions):
            problems.append(f"tokens are {tokens.shape}, expected {(shard.rows, manifest.kind.n_positions)}")
        if tokens.size and tokens.max() >= manifest.kind.n_vocab:
            problems.append(f"token {tokens.max()} in a palette of {manifest.kind.n_vocab}")
        if labels.size and not UNLABELLED <= labels.min() <= labels.max() < len(manifest.classes):
            problems.append(f"labels {labels.min()} to {labels.max()} for {len(manifest.classes)} classes")
        if len(table["key"].unique()) != shard.rows:
            problems.append("a key occurs twice")
        return [f"{shard.path}: {problem}" for problem in problems]


def _check_against_source(store: TokenStore, settings: VerifyConfig, mapper: Mapper) -> list[str]:
    """Compute some shards again with the settings in the manifest, and compare."""
    if settings.remake == 0:
        return []
    settings_used = PrepareConfig.model_validate(store.manifest.made_by["settings"])
    plan = sources.plan(settings_used.source, settings_used.shard_images, settings_used.layout, settings_used.columns)
    tasks = {
        path_of(split, task): task
        for task in tasks_of(plan, settings_used.views)
        for split in splits_of(task.unit, settings_used.holdout)
    }
    chosen = [store.manifest.shards[i] for i in evenly(len(store.manifest.shards), settings.remake)]
    if missing := [shard.path for shard in chosen if shard.path not in tasks]:
        return [f"{path}: the source no longer has this unit" for path in missing]
    arguments = {"tokens": settings.tokens, "settings_used": settings_used}
    pairs = [(shard, tasks[shard.path]) for shard in chosen]
    results = mapper(pairs, RemakeShard, arguments, settings.pool)
    return [problem for problems in results for problem in problems]


class RemakeShard:
    """Maps (shard, task) to a list of the differences between the shard and its source."""

    def __init__(self, tokens: str, settings_used: PrepareConfig):
        self.store = TokenStore.open(tokens)
        self.maker = MakeShard(tokens, self.store.kind, settings_used.pixels, settings_used.holdout, committed={})

    def __call__(self, pair: tuple[Shard, Task]) -> list[str]:
        shard, task = pair
        if task.unit.digest != shard.source:
            return [f"{shard.path}: the source has changed since (other images, or other sizes)"]
        try:
            stored = self.store.read(shard)
        except (StorageError, TokenStoreError):
            return []  # CheckShard has reported this shard
        computed = parse(self.maker.make(task)[shard.split].data)
        if computed.equals(stored):
            return []
        differing = _rows_that_differ(tokens_of(computed), tokens_of(stored))
        return [f"{shard.path}: {differing} of {shard.rows} rows differ from the source"]


def _rows_that_differ(a: np.ndarray, b: np.ndarray) -> int:
    return int((a != b).any(axis=1).sum()) if a.shape == b.shape else max(len(a), len(b))


def _unnamed(store: TokenStore) -> list[str]:
    """URIs of shards and quarantine lists that the manifest does not name, and of temporary files of killed writes.
    Other files are ignored."""
    named = {shard.path for shard in store.manifest.shards}
    named |= {f"quarantine/{path.removesuffix('.parquet').replace('/', '-')}.json" for path in named}
    paths = [storage.relative_to(store.root, entry.uri) for entry in storage.walk(store.root)]
    candidates = [path for path in paths if path.endswith(".parquet") or path.startswith("quarantine/")]
    unnamed = [storage.join(store.root, path) for path in candidates if path not in named]
    return unnamed + [entry.uri for entry in storage.leftovers(store.root)]
