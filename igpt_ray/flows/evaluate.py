"""What a release says about a split as a whole, with Ray Data: likelihood, accuracy. Work is spread by shard."""

import json
import time
from typing import Any

import numpy as np
import torch

from igpt_ray import storage, weights
from igpt_ray.data import pixels
from igpt_ray.data.token_format import Tokens
from igpt_ray.data.token_store import Shard, TokenStore, tokens_of
from igpt_ray.errors import SettingError
from igpt_ray.evaluate.config import EvaluateConfig
from igpt_ray.evaluate.features import Labels
from igpt_ray.evaluate.likelihood import (
    Evaluation,
    Likelihood,
    auroc,
    class_logits,
    count_models,
    heat_map,
    masked_nats,
    nats_both_ways,
)
from igpt_ray.evaluate.linear_probe import Judgement, judge_logits
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.model import losses
from igpt_ray.progress import Progress
from igpt_ray.provenance import provenance

HEAT_MAP_PX = 512
"""About how wide the picture of surprises is drawn."""


def open_store(release: str, tokens: str, *splits: str) -> TokenStore:
    """The store, checked against the release's kind and for the splits, before any worker starts."""
    store = TokenStore.open(tokens)
    weights.check_kind(weights.load_config(release).kind, store.kind, tokens)
    for split in splits:
        store.manifest.select(split)
    return store


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------------ likelihood


def evaluate(settings: EvaluateConfig) -> dict[str, Any]:
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
            "masks": losses.MASKS,
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


def _judged(settings: EvaluateConfig, store: TokenStore) -> Evaluation:
    arguments = {"release": settings.release, "tokens": store.root, "batch_size": settings.batch_size}
    progress = Progress("evaluate", store.manifest.rows(settings.split), "images")
    parts: list[Evaluation] = []
    for part in actor_map(store.manifest.select(settings.split), ShardNats, arguments, settings.pool):
        parts.append(part)
        progress.add(len(part.nats))
    return Evaluation.joined(parts)


def _write_report(settings: EvaluateConfig, store: TokenStore, report: dict[str, Any], judged: Evaluation) -> None:
    """likelihood.json and surprise.png: bright is where an image costs most."""
    n_px = store.kind.n_px
    by_position = (judged.by_position / len(judged.nats)).reshape(n_px, n_px)
    beyond = {
        "by_class": judged.by_class(store.manifest.classes),
        "by_position": by_position.tolist(),
        "ranking": judged.ranking(),
        "made_by": provenance(settings),
    }
    said = json.dumps({**report, **beyond}, indent=1).encode()
    storage.write(storage.join(settings.out, "likelihood.json"), said)
    picture = pixels.png(heat_map(by_position.ravel(), n_px, max(1, HEAT_MAP_PX // n_px)))
    storage.write(storage.join(settings.out, "surprise.png"), picture)


class ShardNats:
    """Shard -> its images and their nats; under a masked network, per masked token. Fine-tuned: and their classes."""

    def __init__(self, release: str, tokens: str, batch_size: int):
        loaded = weights.load_release(release, device())
        self.model = loaded.model
        self.store = TokenStore.open(tokens)
        self.batch_size = batch_size
        self.knows = self.model.config.n_class > 0 and loaded.config.classes == self.store.manifest.classes

    def __call__(self, shard: Shard) -> Evaluation:
        table = self.store.read(shard)
        keys, tokens = table["key"].to_pylist(), tokens_of(table)
        if self.model.causal:
            nats, by_position = nats_both_ways(self.model, tokens, self.batch_size)
        else:
            nats = masked_nats(self.model, tokens, keys, self.batch_size)
            by_position = np.zeros(tokens.shape[1])  # masks differ, so positions cannot be compared
        labels = table["label"].to_numpy().astype(np.int64)
        return Evaluation(keys, labels, nats, by_position, self.classified(tokens, keys, labels))

    def classified(self, tokens: Tokens, keys: list[str], labels: Labels) -> Judgement | None:
        """None if the network has no head for the store's classes, or no image a label."""
        rows = np.flatnonzero(labels >= 0)
        if not self.knows or not len(rows):
            return None
        logits = class_logits(self.model, tokens[rows], [keys[row] for row in rows], self.batch_size)
        return judge_logits(logits, labels[rows], self.model.config.n_class)


def _all_tokens(store: TokenStore, split: str) -> Tokens:
    return np.concatenate([tokens_of(table) for table in store.read_split(split)])
