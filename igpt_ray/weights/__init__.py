"""Read and write weights: our releases, OpenAI's checkpoints and transformers' folders.

A literal table maps the names that differ. A load raises `CheckpointError` if a weight is missing,
unexpected, of another shape or not finite. No pickle is opened, and no code in a file is executed.
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
