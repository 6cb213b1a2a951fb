"""Evaluation of a release on a split with Ray Data: likelihood and accuracy. A work unit is a shard."""

import json
from typing import Any

import numpy as np

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
    nats_by_image_and_position,
)
from igpt_ray.evaluate.linear_probe import ClassificationReport, ClassificationSums, evaluate_logits
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.flows.device import assigned_device
from igpt_ray.model import losses
from igpt_ray.progress import Progress
from igpt_ray.provenance import provenance
from igpt_ray.settings import Result

HEAT_MAP_PX = 512
"""Approximate width of surprise.png."""


def open_store(release: str, tokens: str, *splits: str) -> TokenStore:
    """Open the store and check that its token format is the release's and that the splits exist."""
    store = TokenStore.open(tokens)
    weights.check_kind(weights.load_config(release).kind, store.kind, tokens)
    for split in splits:
        store.manifest.select(split)
    return store


# ------------------------------------------------------------------------------------------------ likelihood


class Classification(ClassificationReport):
    images: int
    """Images with a label."""


class Against(Result):
    """Likelihood of the other images."""

    nats_per_token: float
    standard_error: float
    bits_per_pixel: float
    images: int
    tokens: int
    auroc: float
    """Probability that one of the other images has more nats than one of this split."""


class EvaluateResult(Result):
    """A masked network has `nats_per_masked_token` and `masks` instead of a likelihood."""

    release: str
    split: str
    nats_per_token: float | None = None
    bits_per_pixel: float | None = None
    """Of the image in the colours of the palette."""
    standard_error: float
    """Of the nats, over images."""
    images: int
    tokens: int | None = None
    nats_per_masked_token: float | None = None
    masks: int | None = None
    """Masks per image."""
    classification: Classification | None = None
    """Of a fine-tuned release on a store with its classes."""
    baselines: dict[str, float] | None = None
    """Nats per token of count models."""
    against: Against | None = None


def evaluate(settings: EvaluateConfig) -> EvaluateResult:
    """Nats per token of a split and of count models fitted on `settings.baselines`; accuracy of a fine-tuned network.

    A masked network reports nats per masked token under MASKS masks, which is not a likelihood; its masks vote on the
    class. Raises `SettingError` for settings that need a likelihood.
    """
    store = open_store(settings.release, settings.tokens, settings.split)
    masked = weights.load_config(settings.release).model.objective == "masked"
    if masked and (settings.baselines or settings.out or settings.against):
        raise SettingError("a masked network has no likelihood to compare: remove --baselines, --out and --against")
    other = open_store(settings.release, settings.against, settings.split) if settings.against else None
    evaluation = _evaluation(settings, store)
    nats: dict[str, Any] = Likelihood.of(evaluation.nats, 1 if masked else store.kind.n_positions).report()
    if masked:
        own = {"nats_per_masked_token": nats["nats_per_token"], "masks": losses.MASKS}
        nats = own | {name: nats[name] for name in ("standard_error", "images")}
    report = EvaluateResult(release=settings.release, split=settings.split, **nats)
    if sums := evaluation.classification:
        report.classification = Classification(images=sums.images, **sums.report())
    if settings.baselines:
        splits = (store.read_split(split) for split in (settings.baselines, settings.split))
        fit, test = (np.concatenate([tokens_of(table) for table in tables]) for tables in splits)
        report.baselines = count_models(fit, test, store.kind.n_px, store.kind.n_vocab)
    if other is not None:
        outside = _evaluation(settings, other)
        likelihood: dict[str, Any] = Likelihood.of(outside.nats, store.kind.n_positions).report()
        report.against = Against(**likelihood, auroc=auroc(evaluation.nats, outside.nats))
    if settings.out:
        _write_report(settings, store, report, evaluation)
    return report


def _evaluation(settings: EvaluateConfig, store: TokenStore) -> Evaluation:
    arguments = {"release": settings.release, "tokens": store.root, "batch_size": settings.batch_size}
    progress = Progress("evaluate", store.manifest.rows(settings.split), "images")
    parts: list[Evaluation] = []
    for part in actor_map(store.manifest.select(settings.split), ShardNats, arguments, settings.pool):
        parts.append(part)
        progress.add(len(part.nats))
    return Evaluation.concatenate(parts)


def _write_report(settings: EvaluateConfig, store: TokenStore, result: EvaluateResult, evaluation: Evaluation) -> None:
    """Write likelihood.json and surprise.png, a heat map of nats by position."""
    n_px = store.kind.n_px
    by_position = (evaluation.by_position / len(evaluation.nats)).reshape(n_px, n_px)
    report = {
        **result.line(),
        "by_class": evaluation.by_class(store.manifest.classes),
        "by_position": by_position.tolist(),
        "ranking": evaluation.ranking(),
        "made_by": provenance(settings),
    }
    storage.write(storage.join(settings.out, "likelihood.json"), json.dumps(report, indent=1).encode())
    picture = pixels.png(heat_map(by_position.ravel(), n_px, max(1, HEAT_MAP_PX // n_px)))
    storage.write(storage.join(settings.out, "surprise.png"), picture)


class ShardNats:
    """Shard -> nats of its images (per masked token for a masked network), and classes by a fine-tuned network."""

    def __init__(self, release: str, tokens: str, batch_size: int):
        loaded = weights.load_release(release, assigned_device())
        self.model = loaded.model
        self.store = TokenStore.open(tokens)
        self.batch_size = batch_size
        self.classifies = self.model.config.n_class > 0 and loaded.config.classes == self.store.manifest.classes

    def __call__(self, shard: Shard) -> Evaluation:
        table = self.store.read(shard)
        keys, tokens = table["key"].to_pylist(), tokens_of(table)
        if self.model.causal:
            nats, by_position = nats_by_image_and_position(self.model, tokens, self.batch_size)
        else:
            nats = masked_nats(self.model, tokens, keys, self.batch_size)
            by_position = np.zeros(tokens.shape[1])  # every image has other masks, so positions cannot be compared
        labels = table["label"].to_numpy().astype(np.int64)
        return Evaluation(keys, labels, nats, by_position, self.classify(tokens, keys, labels))

    def classify(self, tokens: Tokens, keys: list[str], labels: Labels) -> ClassificationSums | None:
        """None if the network has no head for the classes of the store, or no image has a label."""
        rows = np.flatnonzero(labels >= 0)
        if not self.classifies or not len(rows):
            return None
        logits = class_logits(self.model, tokens[rows], [keys[row] for row in rows], self.batch_size)
        return evaluate_logits(logits, labels[rows], self.model.config.n_class)
