"""Palettes and token stores on a Ray cluster: `igpt_ray.data` does the work, and Ray Data distributes it."""

from typing import Any

from igpt_ray.data import palette_fit
from igpt_ray.data import prepare as preparation
from igpt_ray.data import verify as verification
from igpt_ray.data.config import PaletteConfig, PrepareConfig, VerifyConfig
from igpt_ray.flows.actor_map import actor_map


def fit_palette(settings: PaletteConfig) -> dict[str, Any]:
    return palette_fit.fit_palette(settings, actor_map)


def prepare(settings: PrepareConfig) -> dict[str, Any]:
    return preparation.prepare(settings, actor_map)


def verify(settings: VerifyConfig) -> dict[str, Any]:
    return verification.verify(settings, actor_map)
