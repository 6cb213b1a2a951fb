"""Features of a token store with Ray Data. A work unit is a shard; a repeat computes only the missing units."""

import time

from igpt_ray import weights
from igpt_ray.data.token_store import Shard, TokenStore
from igpt_ray.evaluate import features
from igpt_ray.evaluate.config import FeaturesConfig
from igpt_ray.evaluate.features import FeatureSpec, FeatureUnit, Manifest
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.flows.device import assigned_device
from igpt_ray.flows.evaluate import open_store
from igpt_ray.model import losses
from igpt_ray.progress import Progress
from igpt_ray.provenance import provenance
from igpt_ray.settings import Result


class FeaturesResult(Result):
    features: str
    """URI of the folder."""
    splits: dict[str, int]
    """Split -> number of images."""
    layers: list[int]
    units: int
    """One per shard of the splits."""
    units_made: int
    """Units that this command computed; the others existed."""
    bytes: int
    """Of all units."""
    images_per_second: float


def extract(settings: FeaturesConfig) -> FeaturesResult:
    """Compute the missing units, then write the manifest of each split."""
    started = time.perf_counter()
    store = open_store(settings.release, settings.tokens, *settings.splits)
    splits = sorted({name for split in settings.splits for name in split.split("+")}) or store.manifest.splits
    spec = _spec(settings, store)
    features.create_or_check(settings.out, spec)
    shards = [shard for split in splits for shard in store.manifest.select(split)]
    units = features.finished(settings.out, shards)
    missing = [shard for shard in shards if shard.path not in units]
    rows = sum(shard.rows for shard in missing)
    progress = Progress("features", rows, "images")
    if missing:
        arguments = {"settings": settings, "spec": spec}
        for shard, unit in zip(missing, actor_map(missing, MakeUnit, arguments, settings.pool), strict=True):
            units[shard.path] = unit
            progress.add(unit.rows)
    for split in splits:
        in_order = [units[shard.path] for shard in store.manifest.select(split)]
        manifest = Manifest(about=spec, split=split, units=in_order, made_by=provenance(settings))
        features.commit(settings.out, manifest)
    return FeaturesResult(
        features=settings.out,
        splits={split: store.manifest.rows(split) for split in splits},
        layers=spec.layers,
        units=len(shards),
        units_made=len(missing),
        bytes=sum(file.bytes for unit in units.values() for file in unit.files),
        images_per_second=round(rows / (time.perf_counter() - started), 2),
    )


def _spec(settings: FeaturesConfig, store: TokenStore) -> FeatureSpec:
    release = weights.load_config(settings.release)
    width = [release.model.n_embd]
    return FeatureSpec(
        format=features.FORMAT,
        release=release.sha256,
        tokens=store.sha256,
        untrained=settings.untrained,
        pooling=settings.pooling,
        precision=settings.precision,
        layers=features.check_layers(settings.layers, release.model.n_layer),
        shape=width if release.model.objective == "next" else [losses.MASKS, *width],
    )


class MakeUnit:
    """Shard -> its FeatureUnit, stored."""

    def __init__(self, settings: FeaturesConfig, spec: FeatureSpec):
        self.settings = settings
        self.spec = spec
        self.store = TokenStore.open(settings.tokens)
        self.model = features.network(
            settings.release, assigned_device(), settings.untrained, settings.precision, settings.compile
        )

    def __call__(self, shard: Shard) -> FeatureUnit:
        return features.make_unit(self.settings.out, self.store, shard, self.spec, self.model, self.settings.batch_size)
