"""Checks for all weight formats: names and shapes match the model exactly, and all values are finite."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from igpt_ray.errors import CheckpointError
from igpt_ray.model.config import ModelConfig

Shape = tuple[int, ...]


def check_shapes(actual: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    if missing := sorted(expected.keys() - actual.keys()):
        raise CheckpointError(f"{where} lacks {_some(missing)}")
    if foreign := sorted(actual.keys() - expected.keys()):
        raise CheckpointError(f"{where} has weights that the model does not have: {_some(foreign)}")
    for name, shape in actual.items():
        if shape != expected[name]:
            raise CheckpointError(f"{where}: {name} is {shape}, expected {expected[name]}")


def check_finite(name: str, value: Tensor, where: str) -> None:
    if not torch.isfinite(value).all():
        raise CheckpointError(f"{where}: {name} has values that are not finite")


def config_from_sizes(where: str, positions: str, n_positions: int, **sizes: Any) -> ModelConfig:
    """The settings of a model with these sizes. Raises `CheckpointError` if no model has them."""
    n_px = math.isqrt(n_positions)
    if n_px**2 != n_positions:
        raise CheckpointError(f"{where}: {positions} has {n_positions} positions, which is not a square number")
    try:
        return ModelConfig(n_px=n_px, **sizes)
    except ValidationError as error:
        raise CheckpointError(f"{where} has invalid sizes: {error.errors()[0]['msg']}") from error


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
