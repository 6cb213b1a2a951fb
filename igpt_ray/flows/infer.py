"""What a release says about a split, with Ray Data: likelihood, scores, features for the probe, completions.

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
from torch import Tensor

from igpt_ray import config, images, objectives, probe, sampling, storage, weights
from igpt_ray.errors import NotFound, SettingError
from igpt_ray.evaluate import Likelihood, count_models, image_nats, masked_nats
from igpt_ray.flows.pool import spread
from igpt_ray.model import ImageGPT
from igpt_ray.palette import Palette
from igpt_ray.shards import Shard, Tokens, TokenStore, evenly, tokens_of

log = logging.getLogger(__name__)


def _open(release: str, tokens: str, *splits: str) -> TokenStore:
    """The store, checked against the release's kind and for the splits, before any worker starts."""
    store = TokenStore.open(tokens)
    weights.check_kind(weights.load_config(release), store.kind, tokens)
    for split in splits:
        store.manifest.select(split)
    return store


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------------ likelihood


def evaluate(settings: config.Evaluate) -> dict[str, Any]:
    """Nats per token of a split, and of count models if a split to fit them on is named.

    For a masked network, nats per masked token under MASKS masks, which is no likelihood: nothing counts beside it.
    """
    started = time.perf_counter()
    store = _open(settings.release, settings.tokens, settings.split)
    shards = store.manifest.select(settings.split)
    masked = weights.load_config(settings.release).model.objective == "masked"
    if masked and settings.baselines:
        raise SettingError("count models predict the next pixel, a masked network does not: leave --baselines out")
    arguments = {"release": settings.release, "tokens": settings.tokens, "batch_size": settings.batch_size}
    n_positions = 1 if masked else store.kind.n_positions
    total = Likelihood.of(np.empty(0), n_positions)
    for nats in spread(shards, ShardNats, arguments, settings.pool):
        total += Likelihood.of(nats, n_positions)
        log.info("%d of %d images", total.images, store.manifest.rows(settings.split))
    found: dict[str, Any] = total.report()
    if masked:
        found = {
            "nats_per_masked_token": found["nats_per_token"],
            "standard_error": found["standard_error"],
            "masks": objectives.MASKS,
            "images": found["images"],
        }
    report = {"release": settings.release, "split": settings.split, **found}
    if settings.baselines:
        fit, test = (_all_tokens(store, split) for split in (settings.baselines, settings.split))
        report["baselines"] = count_models(fit, test, store.kind.n_px, store.kind.n_vocab)
    return {**report, "seconds": round(time.perf_counter() - started, 2)}


class ShardNats:
    """Shard -> nats of each of its images, (rows,); under a masked network, per masked token."""

    def __init__(self, release: str, tokens: str, batch_size: int):
        self.model = weights.load_release(release, _device()).model
        self.store = TokenStore.open(tokens)
        self.batch_size = batch_size

    def __call__(self, shard: Shard) -> np.ndarray:
        table = self.store.read(shard)
        if self.model.causal:
            return image_nats(self.model, tokens_of(table), self.batch_size)
        return masked_nats(self.model, tokens_of(table), table["key"].to_pylist(), self.batch_size)


def score(settings: config.Score) -> dict[str, Any]:
    """A Parquet file per shard with key, label and the nats of every image."""
    started = time.perf_counter()
    weights.check_next(weights.load_config(settings.release), settings.release)
    store = _open(settings.release, settings.tokens, settings.split)
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


class ScoreShard(ShardNats):
    """Shard -> its Parquet file of nats, made unless it is there."""

    def __init__(self, release: str, tokens: str, batch_size: int, out: str):
        super().__init__(release, tokens, batch_size)
        self.mark = _mark(release)
        self.out = out

    def __call__(self, shard: Shard) -> pa.Table:
        def make() -> pa.Table:
            source = self.store.read(shard)
            nats = image_nats(self.model, tokens_of(source), self.batch_size)
            return source.select(["key", "label"]).append_column("nats", pa.array(nats))

        return _once(storage.join(self.out, shard.path), f"{self.mark} {shard.sha256}", make)


# ------------------------------------------------------------------------------------------------ probe


def probe_layers(settings: config.Probe) -> dict[str, Any]:
    """Accuracy of a linear probe on every layer; also untrained and on raw pixels with `baselines`."""
    started = time.perf_counter()
    store = _open(settings.release, settings.tokens, settings.fit_split, settings.split)
    report: dict[str, Any] = {"release": settings.release, **_probe_network(settings, store, untrained=False)}
    if settings.baselines:
        report["untrained"] = _probe_network(settings, store, untrained=True)
        palette = store.palette()
        fit, test = (_raw_pixels(store, palette, split) for split in (settings.fit_split, settings.split))
        report["raw_pixels"] = probe.probe(fit, test, len(store.manifest.classes), settings.seed)
    storage.write(
        storage.join(settings.out, "probe.json"),
        json.dumps({**report, "made_by": config.provenance(settings)}, indent=1).encode(),
    )
    return {**report, "seconds": round(time.perf_counter() - started, 2)}


def _probe_network(settings: config.Probe, store: TokenStore, untrained: bool) -> dict[str, Any]:
    fit = _features(settings, store, settings.fit_split, untrained)
    test = _features(settings, store, settings.split, untrained)
    layers = []
    for layer in range(fit.features.shape[-2]):
        fit_layer, test_layer = (probe.Labelled(x.features[..., layer, :], x.labels) for x in (fit, test))
        layers.append(probe.probe(fit_layer, test_layer, len(store.manifest.classes), settings.seed))
        log.info("%s layer %d: %.1f %%", "untrained" if untrained else "pretrained", layer, 100 * layers[-1]["test"])
    best = max(range(len(layers)), key=lambda i: layers[i]["validation"])
    return {"best_layer": best, "accuracy": layers[best]["test"], "layers": layers}


def _features(settings: config.Probe, store: TokenStore, split: str, untrained: bool) -> probe.Labelled:
    """(N, layers, C) of a split, or (N, masks, layers, C), through Parquet files below `out`."""
    arguments = {
        "release": settings.release,
        "tokens": settings.tokens,
        "batch_size": settings.batch_size,
        "out": storage.join(settings.out, "features-untrained" if untrained else "features"),
        "untrained_seed": settings.seed if untrained else None,
    }
    tables = list(spread(store.manifest.select(split), FeaturesOfShard, arguments, settings.pool))
    features = np.concatenate([t["features"].combine_chunks().to_numpy_ndarray() for t in tables])
    return probe.Labelled(features, np.concatenate([t["label"].to_numpy() for t in tables]).astype(np.int64))


class FeaturesOfShard:
    """Shard -> its Parquet file of features, made unless it is there: key, label, features (layers, C) float32.

    A masked network looks at each image under MASKS masks: features (MASKS, layers, C).
    """

    def __init__(self, release: str, tokens: str, batch_size: int, out: str, untrained_seed: int | None):
        self.model = weights.load_release(release, _device()).model
        self.mark = _mark(release)
        if untrained_seed is not None:
            torch.manual_seed(untrained_seed)
            self.model.init_weights()
            self.mark += f" untrained {untrained_seed}"
        self.store = TokenStore.open(tokens)
        self.batch_size = batch_size
        self.out = out

    def __call__(self, shard: Shard) -> pa.Table:
        def make() -> pa.Table:
            source = self.store.read(shard)
            if self.model.causal:
                features = pooled_features(self.model, tokens_of(source), self.batch_size)
            else:
                features = masked_features(self.model, tokens_of(source), source["key"].to_pylist(), self.batch_size)
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(features)
            return source.select(["key", "label"]).append_column("features", column)

        return _once(storage.join(self.out, shard.path), f"{self.mark} {shard.sha256}", make)


@torch.inference_mode()
def pooled_features(model: ImageGPT, tokens: Tokens, batch_size: int, keep: Tensor | None = None) -> np.ndarray:
    """Every layer's features, of images masked by `keep` (N, T): (N, T) -> (N, layers + 1, C) float32."""
    parts, device = [], model.wpe.device
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        x = torch.from_numpy(tokens[rows].astype(np.int64)).to(device)
        features = model.features(x, keep=None if keep is None else keep[rows].to(device))
        parts.append(features.float().cpu().numpy())
    return np.concatenate(parts)


def masked_features(model: ImageGPT, tokens: Tokens, keys: list[str], batch_size: int) -> np.ndarray:
    """The same under each of an image's masks: (N, T) -> (N, MASKS, layers + 1, C)."""
    keeps = (objectives.keep_of_keys(keys, mask, tokens.shape[1]) for mask in range(objectives.MASKS))
    return np.stack([pooled_features(model, tokens, batch_size, keep) for keep in keeps], axis=1)


def _raw_pixels(store: TokenStore, palette: Palette, split: str) -> probe.Labelled:
    """The quantised picture itself as features: (N, T * 3) in [0, 1]."""
    tables = list(store.read_split(split))
    tokens = np.concatenate([tokens_of(t) for t in tables])
    labels = np.concatenate([t["label"].to_numpy() for t in tables]).astype(np.int64)
    return probe.Labelled((palette.decode(tokens).reshape(len(tokens), -1) / 255).astype(np.float32), labels)


# ------------------------------------------------------------------------------------------------ completions


def complete(settings: config.Complete) -> dict[str, Any]:
    """Finish pictures of a split; write their tokens as Parquet and the figure: given | completions | original."""
    started = time.perf_counter()
    weights.check_next(weights.load_config(settings.release), settings.release)
    store = _open(settings.release, settings.tokens, settings.split)
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
        self.model = weights.load_release(release, _device()).model
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
