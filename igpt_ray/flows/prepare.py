"""Palette and token shards on a Ray cluster: `igpt_ray.data` does the work, and Ray Data distributes it."""

from typing import Any

from igpt_ray.data import palette_fit
from igpt_ray.data import prepare as preparation
from igpt_ray.data.config import PaletteConfig, PrepareConfig
from igpt_ray.flows.actor_map import actor_map


def fit_palette(settings: PaletteConfig) -> dict[str, Any]:
    """Fit a palette with `data.palette_fit.fit_palette` on the cluster."""
    return palette_fit.fit_palette(settings, actor_map)


def prepare(settings: PrepareConfig) -> dict[str, Any]:
    """Prepare a token store with `data.prepare.prepare` on the cluster."""
    return preparation.prepare(settings, actor_map)
