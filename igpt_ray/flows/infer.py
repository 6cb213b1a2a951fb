"""What a release says about a split, with Ray Data: likelihood, scores, completions.

Work is spread by shard. Where a job writes, every input shard becomes one output file with a name that follows from
it, marked with the release and shard it was made from: a repeat redoes only what is missing or out of date.
"""

import io
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from igpt_ray import config, images, objectives, sampling, storage, weights
from igpt_ray.errors import NotFound, SettingError
from igpt_ray.evaluate import (
    Judged,
    Likelihood,
    auroc,
    class_logits,
    count_models,
    heat_map,
    image_nats,
    masked_nats,
    nats_both_ways,
)
from igpt_ray.features import Labels
from igpt_ray.flows.pool import spread
from igpt_ray.probe import Judgement, judge_logits
from igpt_ray.shards import Shard, Tokens, TokenStore, evenly, tokens_of

log = logging.getLogger(__name__)

HEAT_MAP_PX = 512
"""About how wide the picture of surprises is drawn."""


def open_store(release: str, tokens: str, *splits: str) -> TokenStore:
    """The store, checked against the release's kind and for the splits, before any worker starts."""
    store = TokenStore.open(tokens)
    weights.check_kind(weights.load_config(release), store.kind, tokens)
    for split in splits:
        store.manifest.select(split)
    return store


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------------ likelihood


def evaluate(settings: config.Evaluate) -> dict[str, Any]:
    """Nats per token of a split, and of count models if a split to fit them on is named. Of a fine-tuned network also
    how many images it classifies rightly: if it is masked, by a vote of MASKS masks.

    For a masked network, nats per masked token under MASKS masks, which is no likelihood: nothing counts beside it.
    """
    started = time.perf_counter()
    store = open_store(settings.release, settings.tokens, settings.split)
    masked = weights.load_config(settings.release).model.objective == "masked"
    if masked and (settings.baselines or settings.out or settings.against):
        raise SettingError(
            "a masked network gives no picture a probability that could be compared: leave --baselines, --out and"
            " --against out"
        )
    other = open_store(settings.release, settings.against, settings.split) if settings.against else None
    judged = _judged(settings, store)
    found: dict[str, Any] = Likelihood.of(judged.nats, 1 if masked else store.kind.n_positions).report()
    if masked:
        found = {
            "nats_per_masked_token": found["nats_per_token"],
            "standard_error": found["standard_error"],
            "masks": objectives.MASKS,
            "images": found["images"],
        }
    report = {"release": settings.release, "split": settings.split, **found}
    if judged.classified is not None:
        report["classification"] = {"images": judged.classified.images, **judged.classified.report()}
    if settings.baselines:
        fit, test = (_all_tokens(store, split) for split in (settings.baselines, settings.split))
        report["baselines"] = count_models(fit, test, store.kind.n_px, store.kind.n_vocab)
    if other is not None:
        outside = _judged(settings, other)
        report["against"] = {
            "tokens": settings.against,
            **Likelihood.of(outside.nats, store.kind.n_positions).report(),
            "auroc": auroc(judged.nats, outside.nats),
        }
    if settings.out:
        _write_report(settings, store, report, judged)
    return {**report, "seconds": round(time.perf_counter() - started, 2)}


def _judged(settings: config.Evaluate, store: TokenStore) -> Judged:
    arguments = {"release": settings.release, "tokens": store.root, "batch_size": settings.batch_size}
    rows, parts = store.manifest.rows(settings.split), list[Judged]()
    for part in spread(store.manifest.select(settings.split), ShardNats, arguments, settings.pool):
        parts.append(part)
        log.info("%d of %d images", sum(len(part.nats) for part in parts), rows)
    return Judged.joined(parts)


def _write_report(settings: config.Evaluate, store: TokenStore, report: dict[str, Any], judged: Judged) -> None:
    """likelihood.json and surprise.png: bright is where an image costs most."""
    n_px = store.kind.n_px
    by_position = (judged.by_position / len(judged.nats)).reshape(n_px, n_px)
    beyond = {
        "by_class": judged.by_class(store.manifest.classes),
        "by_position": by_position.tolist(),
        "ranking": judged.ranking(),
        "made_by": config.provenance(settings),
    }
    said = json.dumps({**report, **beyond}, indent=1).encode()
    storage.write(storage.join(settings.out, "likelihood.json"), said)
    picture = images.png(heat_map(by_position.ravel(), n_px, max(1, HEAT_MAP_PX // n_px)))
    storage.write(storage.join(settings.out, "surprise.png"), picture)


class ShardNats:
    """Shard -> its images and their nats; under a masked network, per masked token. Fine-tuned: and their classes."""

    def __init__(self, release: str, tokens: str, batch_size: int):
        loaded = weights.load_release(release, device())
        self.model = loaded.model
        self.store = TokenStore.open(tokens)
        self.batch_size = batch_size
        self.knows = self.model.config.n_class > 0 and loaded.config.classes == self.store.manifest.classes

    def __call__(self, shard: Shard) -> Judged:
        table = self.store.read(shard)
        keys, tokens = table["key"].to_pylist(), tokens_of(table)
        if self.model.causal:
            nats, by_position = nats_both_ways(self.model, tokens, self.batch_size)
        else:
            nats = masked_nats(self.model, tokens, keys, self.batch_size)
            by_position = np.zeros(tokens.shape[1])  # masks differ, so positions cannot be compared
        labels = table["label"].to_numpy().astype(np.int64)
        return Judged(keys, labels, nats, by_position, self.classified(tokens, keys, labels))

    def classified(self, tokens: Tokens, keys: list[str], labels: Labels) -> Judgement | None:
        """None if the network has no head for the store's classes, or no image a label."""
        rows = np.flatnonzero(labels >= 0)
        if not self.knows or not len(rows):
            return None
        logits = class_logits(self.model, tokens[rows], [keys[row] for row in rows], self.batch_size)
        return judge_logits(logits, labels[rows], self.model.config.n_class)


def score(settings: config.Score) -> dict[str, Any]:
    """A Parquet file per shard with key, label and the nats of every image."""
    started = time.perf_counter()
    weights.check_next(weights.load_config(settings.release), settings.release)
    store = open_store(settings.release, settings.tokens, settings.split)
    shards = store.manifest.select(settings.split)
    arguments = {
        "release": settings.release,
        "tokens": settings.tokens,
        "batch_size": settings.batch_size,
        "out": settings.out,
    }
    total = Likelihood.of(np.empty(0), store.kind.n_positions)
    for table in spread(shards, ScoreShard, arguments, settings.pool):
        total += Likelihood.of(table["nats"].to_numpy(), store.kind.n_positions)
        log.info("%d of %d images", total.images, store.manifest.rows(settings.split))
    report = {"release": settings.release, "split": settings.split, "out": settings.out, **total.report()}
    storage.write(
        storage.join(settings.out, f"{settings.split}.json"),
        json.dumps({**report, "made_by": config.provenance(settings)}).encode(),
    )
    return {**report, "seconds": round(time.perf_counter() - started, 2)}


class ScoreShard:
    """Shard -> its Parquet file of nats, made unless it is there."""

    def __init__(self, release: str, tokens: str, batch_size: int, out: str):
        self.model = weights.load_release(release, device()).model
        self.store = TokenStore.open(tokens)
        self.batch_size = batch_size
        self.mark = _mark(release)
        self.out = out

    def __call__(self, shard: Shard) -> pa.Table:
        def make() -> pa.Table:
            source = self.store.read(shard)
            nats = image_nats(self.model, tokens_of(source), self.batch_size)
            return source.select(["key", "label"]).append_column("nats", pa.array(nats))

        return _once(storage.join(self.out, shard.path), f"{self.mark} {shard.sha256}", make)


# ------------------------------------------------------------------------------------------------ completions


def complete(settings: config.Complete) -> dict[str, Any]:
    """Finish pictures of a split; write their tokens as Parquet and the figure: given | completions | original."""
    started = time.perf_counter()
    weights.check_next(weights.load_config(settings.release), settings.release)
    store = open_store(settings.release, settings.tokens, settings.split)
    n_px = store.kind.n_px
    rows = n_px // 2 if settings.rows is None else settings.rows
    if rows > n_px:
        raise SettingError(f"{rows} rows are given; a picture has {n_px}")
    keys, originals = _pick_images(store, settings.split, settings.images)
    tasks = [(originals[i], _seeds(settings.seed, i, settings.n)) for i in range(len(originals))]
    arguments = {
        "release": settings.release,
        "given": rows * n_px,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
    }
    completions = np.stack(list(spread(tasks, CompletePicture, arguments, settings.pool)))  # (images, n, T)
    sampling_seconds = time.perf_counter() - started
    table = pa.table(
        {
            "key": keys,
            "original": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(originals)),
            "completions": pa.FixedShapeTensorArray.from_numpy_ndarray(completions),
        }
    ).replace_schema_metadata({"igpt_ray": json.dumps({"given": rows * n_px, **config.provenance(settings)})})
    storage.write(storage.join(settings.out, "completions.parquet"), _parquet(table))
    figure = sampling.figure(store.palette(), originals, completions, rows)
    storage.write(storage.join(settings.out, "completions.png"), images.png(figure))
    n_tokens = completions.size - len(originals) * settings.n * rows * n_px
    return {
        "figure": storage.join(settings.out, "completions.png"),
        "images": len(originals),
        "completions": len(originals) * settings.n,
        "sampled_tokens": n_tokens,
        "tokens_per_second": round(n_tokens / sampling_seconds, 1),
        "seconds": round(time.perf_counter() - started, 2),
    }


class CompletePicture:
    """(tokens (T,), n seeds) -> n finished pictures, (n, T) uint16."""

    def __init__(self, release: str, given: int, temperature: float, top_k: int):
        self.model = weights.load_release(release, device()).model
        self.given = given
        self.temperature = temperature
        self.top_k = top_k

    def __call__(self, task: tuple[Tokens, list[int]]) -> Tokens:
        tokens, seeds = task
        given = torch.from_numpy(tokens[None, : self.given].astype(np.int64)).to(self.model.wpe.device)
        done = sampling.complete(self.model, given, len(seeds), seeds, self.temperature, self.top_k)
        return done.cpu().numpy().astype(np.uint16)


def _pick_images(store: TokenStore, split: str, n: int) -> tuple[list[str], Tokens]:
    """n images spread evenly over a split: their keys and tokens."""
    total = store.manifest.rows(split)
    wanted = evenly(total, n)
    keys, tokens, start = [], [], 0
    for shard in store.manifest.select(split):
        here = wanted[(wanted >= start) & (wanted < start + shard.rows)] - start
        start += shard.rows
        if len(here):
            table = store.read(shard)
            keys += [table["key"][int(i)].as_py() for i in here]
            tokens.append(tokens_of(table)[here])
    return keys, np.concatenate(tokens)


def _seeds(seed: int, image: int, n: int) -> list[int]:
    """One stream per sample, a function of the seed, the picture's number and the sample's."""
    return [sampling.seed_of(seed, image, i) for i in range(n)]


# ------------------------------------------------------------------------------------------------ helpers


def _all_tokens(store: TokenStore, split: str) -> Tokens:
    return np.concatenate([tokens_of(table) for table in store.read_split(split)])


def _mark(release: str) -> str:
    """The release by content: its config names the hash of the weights."""
    return weights.load_config(release).sha256


def _once(uri: str, mark: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The table at `uri` if it is there, whole, and marked so; otherwise made, marked and written."""
    try:
        table = pq.read_table(io.BytesIO(storage.read(uri)), page_checksum_verification=True)
        if (table.schema.metadata or {}).get(b"made_from") == mark.encode():
            return table
    except (NotFound, pa.ArrowException, OSError):
        pass  # absent or damaged: either way it is made again
    table = make().replace_schema_metadata({"made_from": mark})
    storage.write(uri, _parquet(table))
    return table


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    return out.getvalue()
