"""What every format is held to: each name, each shape, each value finite; nothing missing, nothing left over."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from igpt_ray.errors import CheckpointError
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT

Shape = tuple[int, ...]


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{where} lacks {_some(missing)}")
    if foreign := sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"{where} holds weights this model does not have: {_some(foreign)}")
    for name, shape in found.items():
        if shape != expected[name]:
            raise CheckpointError(f"{where}: {name} is {shape}, expected {expected[name]}")


def check_finite(name: str, value: Tensor, where: str) -> None:
    if not torch.isfinite(value).all():
        raise CheckpointError(f"{where}: {name} has values that are not finite")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def row_of(name: str) -> tuple[str, str]:
    """Where one of our weights stands in a table, and the number of its block: `h.3.ln_1.weight` -> `h.#.ln_1.weight`
    and `3`."""
    block = re.match(r"h\.(\d+)\.(.*)", name)
    return (f"h.#.{block[2]}", block[1]) if block else (name, "")


def outline(model: ModelConfig) -> ImageGPT:
    """A network without memory for its weights, to be given some by `to_empty` and filled: no random number is drawn,
    and names and shapes can be checked first."""
    with torch.device("meta"):
        return ImageGPT(model)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
