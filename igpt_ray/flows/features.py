"""Features of a token store's images, with Ray Data: a unit of work is a shard, and a repeat makes what is missing."""

import functools
import time
from typing import Any

from igpt_ray import weights
from igpt_ray.data.token_store import Shard, TokenStore
from igpt_ray.evaluate import features
from igpt_ray.evaluate.config import FeaturesConfig
from igpt_ray.evaluate.features import About, FeatureUnit, Manifest
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.flows.evaluate import device, open_store
from igpt_ray.model import losses
from igpt_ray.progress import Progress
from igpt_ray.provenance import provenance
from igpt_ray.settings import PoolConfig


def extract(settings: FeaturesConfig) -> dict[str, Any]:
    """Make every unit that is not there yet, then each split's manifest."""
    started = time.perf_counter()
    store = open_store(settings.release, settings.tokens, *settings.splits)
    splits = sorted({name for split in settings.splits for name in split.split("+")}) or store.manifest.splits
    about = _about(settings, store)
    features.create_or_check(settings.out, about)
    wanted = [shard for split in splits for shard in store.manifest.select(split)]
    units = features.finished(settings.out, wanted)
    missing = [shard for shard in wanted if shard.path not in units]
    rows = sum(shard.rows for shard in missing)
    arguments = {"settings": settings, "about": about}
    made, progress = 0, Progress("features", rows, "images")
    for shard, unit in zip(missing, _made(missing, arguments, settings.pool), strict=True):
        units[shard.path] = unit
        made += unit.rows
        progress.add(unit.rows)
    for split in splits:
        listed = [units[shard.path] for shard in store.manifest.select(split)]
        made_by = provenance(settings)
        features.commit(settings.out, Manifest(about=about, split=split, units=listed, made_by=made_by))
    seconds = time.perf_counter() - started
    return {
        "features": settings.out,
        "splits": {split: store.manifest.rows(split) for split in splits},
        "layers": about.layers,
        "units": len(wanted),
        "units_made": len(missing),
        "bytes": sum(file.bytes for unit in units.values() for file in unit.files),
        "images_per_second": round(rows / seconds, 2),
        "seconds": round(seconds, 2),
    }


def _made(missing: list[Shard], arguments: dict[str, Any], pool: PoolConfig) -> Any:
    return actor_map(missing, MakeUnit, arguments, pool) if missing else iter(())


def _about(settings: FeaturesConfig, store: TokenStore) -> About:
    release = weights.load_config(settings.release)
    width = [release.model.n_embd]
    return About(
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
    """Shard -> the unit of its features, stored."""

    def __init__(self, settings: FeaturesConfig, about: About):
        self.store = TokenStore.open(settings.tokens)
        self.model = features.network(
            settings.release, device(), settings.untrained, settings.precision, settings.compile
        )
        self.make = functools.partial(features.make_unit, settings.out, self.store)
        self.about = about
        self.batch_size = settings.batch_size

    def __call__(self, shard: Shard) -> FeatureUnit:
        return self.make(shard, self.about, self.model, self.batch_size)
