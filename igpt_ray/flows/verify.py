"""Is a token store what its manifest says, and what its source gives? With Ray Data, a shard at a time.

Every shard: bytes, sha256, what it says of itself, rows, tokens and labels in range, no key twice. A few shards are
made again from the source and compared byte by byte. Files that no manifest names are listed, and removed if asked.
"""

import logging
import time
from typing import Any

import numpy as np

from igpt_ray import storage
from igpt_ray.data import sources
from igpt_ray.data.config import PrepareConfig, VerifyConfig
from igpt_ray.data.token_store import Shard, TokenStore, about, evenly, parse, tokens_of
from igpt_ray.errors import StorageError, TokenStoreError
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.flows.prepare import MakeShard, Task, path_of, splits_of, tasks_of

log = logging.getLogger(__name__)

SHOWN = 5
"""Problems named in the error; all are logged."""


def verify(settings: VerifyConfig) -> dict[str, Any]:
    """Raises `TokenStoreError` naming what is wrong; otherwise says what was checked."""
    started = time.perf_counter()
    store = TokenStore.open(settings.tokens)
    store.palette()
    problems: list[str] = []
    for n, found in enumerate(actor_map(store.manifest.shards, CheckShard, {"tokens": settings.tokens}, settings.pool)):
        problems += found
        log.info("%d of %d shards, %d problems", n + 1, len(store.manifest.shards), len(problems))
    problems += _check_against_source(store, settings)
    for problem in problems:
        log.error("%s", problem)
    if problems:
        more = f" ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise TokenStoreError(
            f"{settings.tokens} has {len(problems)} problem(s): {'; '.join(problems[:SHOWN])}{more}."
            " Delete what is damaged and repeat jobs/prepare.py"
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
    """Shard -> what is wrong with it, one line each."""

    def __init__(self, tokens: str):
        self.store = TokenStore.open(tokens)

    def __call__(self, shard: Shard) -> list[str]:
        manifest = self.store.manifest
        try:
            table = self.store.read(shard)
        except (StorageError, TokenStoreError) as error:
            return [str(error)]
        said, tokens, labels = about(table.schema), tokens_of(table), table["label"].to_numpy()
        wrong = []
        for field, value in manifest.kind.model_dump().items():
            if said.get(field) != value:
                wrong.append(f"{field} is {said.get(field)}, the manifest says {value}")
        if said.get("source") != shard.source:
            wrong.append("made from another unit than the manifest says")
        if tokens.shape != (shard.rows, manifest.kind.n_positions):
            wrong.append(f"tokens are {tokens.shape}, expected {(shard.rows, manifest.kind.n_positions)}")
        if tokens.size and tokens.max() >= manifest.kind.n_vocab:
            wrong.append(f"token {tokens.max()} in a palette of {manifest.kind.n_vocab}")
        if labels.size and not 0 <= labels.min() <= labels.max() < len(manifest.classes):
            wrong.append(f"labels {labels.min()} to {labels.max()} for {len(manifest.classes)} classes")
        if len(table["key"].unique()) != shard.rows:
            wrong.append("a key occurs twice")
        return [f"{shard.path}: {problem}" for problem in wrong]


def _check_against_source(store: TokenStore, settings: VerifyConfig) -> list[str]:
    """Make some shards again with the settings in the manifest."""
    if settings.remake == 0:
        return []
    made_with = PrepareConfig.model_validate(store.manifest.made_by["settings"])
    plan = sources.plan(made_with.source, made_with.shard_images, made_with.layout)
    tasks = {
        path_of(split, task): task
        for task in tasks_of(plan, made_with.views)
        for split in splits_of(task.unit, made_with.holdout)
    }
    chosen = [store.manifest.shards[i] for i in evenly(len(store.manifest.shards), settings.remake)]
    if missing := [shard.path for shard in chosen if shard.path not in tasks]:
        return [f"{path}: the source has no such unit any more" for path in missing]
    arguments = {"tokens": settings.tokens, "made_with": made_with}
    work = [(shard, tasks[shard.path]) for shard in chosen]
    return [line for found in actor_map(work, RemakeShard, arguments, settings.pool) for line in found]


class RemakeShard:
    """(Shard, Task) -> what differs from the source."""

    def __init__(self, tokens: str, made_with: PrepareConfig):
        self.store = TokenStore.open(tokens)
        self.maker = MakeShard(tokens, self.store.kind, made_with.pixels, made_with.holdout, committed={})

    def __call__(self, work: tuple[Shard, Task]) -> list[str]:
        shard, task = work
        if task.unit.digest != shard.source:
            return [f"{shard.path}: the source has changed since (other images, or other sizes)"]
        try:
            there = self.store.read(shard)
        except (StorageError, TokenStoreError):
            return []  # named already
        again = parse(self.maker.make(task)[shard.split][0])
        if again.equals(there):
            return []
        differing = _rows_that_differ(tokens_of(again), tokens_of(there))
        return [f"{shard.path}: {differing} of {shard.rows} rows are not what the source gives"]


def _rows_that_differ(a: np.ndarray, b: np.ndarray) -> int:
    return int((a != b).any(axis=1).sum()) if a.shape == b.shape else max(len(a), len(b))


def _unnamed(store: TokenStore) -> list[str]:
    """Shards and quarantine lists below the store that its manifest does not account for, and temporary files of
    writes that were killed; other files are not ours."""
    named = {shard.path for shard in store.manifest.shards}
    named |= {f"quarantine/{path.removesuffix('.parquet').replace('/', '-')}.json" for path in named}
    relative_to = [storage.relative_to(store.root, entry.uri) for entry in storage.walk(store.root)]
    ours = [path for path in relative_to if path.endswith(".parquet") or path.startswith("quarantine/")]
    unnamed = [storage.join(store.root, path) for path in ours if path not in named]
    return unnamed + [entry.uri for entry in storage.leftovers(store.root)]
