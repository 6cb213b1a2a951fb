"""Weights in and out: our own releases, OpenAI's checkpoints, transformers' folders.

Each format is one literal table. Nothing that is missing, left over, cut off, of another shape or not finite gets as
far as a model; no pickle is opened, and nothing in a file can run.
"""

from igpt_ray.weights.hf import load_hf, save_hf
from igpt_ray.weights.openai import load_openai
from igpt_ray.weights.release import (
    FORMAT,
    Release,
    ReleaseConfig,
    check_kind,
    check_next,
    load_config,
    load_release,
    save_release,
)

__all__ = [
    "FORMAT",
    "Release",
    "ReleaseConfig",
    "check_kind",
    "check_next",
    "load_config",
    "load_hf",
    "load_openai",
    "load_release",
    "save_hf",
    "save_release",
]
