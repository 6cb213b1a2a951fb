"""OpenAI's checkpoints -> ImageGPT. They are TensorFlow's, but TensorFlow is not needed to read them.

A masked ("BERT") checkpoint is known by its lack of a start vector. All sizes follow from the shapes.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from igpt_ray import storage
from igpt_ray.errors import CheckpointError
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.weights.check import Shape, check_finite, check_shapes, outline, row_of
from igpt_ray.weights.tf_bundle import Bundle


def _same(w: Tensor) -> Tensor:
    return w


def _transposed(w: Tensor) -> Tensor:
    """OpenAI's `conv1d` is [in, out], torch's Linear [out, in]."""
    return w.T


def _heads_to_rows(*heads: Tensor) -> Tensor:
    """`bsf,hef->bhse`: each (N, D, C) is a Linear's [out, in] once heads and their width are one axis."""
    return torch.cat([w.flatten(0, 1) for w in heads])


def _heads_to_columns(w: Tensor) -> Tensor:
    """`bhse,hef->bsf`: here heads and their width are what comes in."""
    return w.flatten(0, 1).T


class TensorMapping(NamedTuple):
    """The variables that make one of our weights, their shape, and how they become it."""

    names: tuple[str, ...]
    shape: str
    turn: Callable[..., Tensor]


TABLE = {
    "wpe": TensorMapping(("model/wpe",), "T C", _same),
    "wte.weight": TensorMapping(("model/wte",), "V C", _same),
    "wtet.weight": TensorMapping(("model/wtet",), "V C", _same),
    "sos": TensorMapping(("model/sos",), "C", _same),
    "ln_f.weight": TensorMapping(("model/ln_f/g",), "C", _same),
    "h.#.ln_1.weight": TensorMapping(("model/h#/ln_1/g",), "C", _same),
    "h.#.attn.c_attn.weight": TensorMapping(
        ("model/h#/attn/q_proj", "model/h#/attn/k_proj", "model/h#/attn/v_proj"), "N D C", _heads_to_rows
    ),
    "h.#.attn.c_proj.weight": TensorMapping(("model/h#/attn/c_proj",), "N D C", _heads_to_columns),
    "h.#.ln_2.weight": TensorMapping(("model/h#/ln_2/g",), "C", _same),
    "h.#.mlp.c_fc.weight": TensorMapping(("model/h#/mlp/c_fc/w",), "C 4C", _transposed),
    "h.#.mlp.c_proj.weight": TensorMapping(("model/h#/mlp/c_proj/w",), "4C C", _transposed),
}
"""Our name -> theirs; # is the number of a block. Shapes are in the letters of model.py."""

OPTIMISER = re.compile(r"(?!model/)|.*/Adam(_1)?$")
"""What training leaves in a checkpoint beside the weights: Adam's moments, its powers, the step."""


def load_openai(prefix: str | Path) -> ImageGPT:
    """The network of a checkpoint, in evaluation mode: `prefix` is its path or URI without `.index`.

    Raises `CheckpointError` if anything is missing, cut off, altered, left over, of another shape, or not finite.
    """
    where = storage.absolute(str(prefix))
    bundle = Bundle.open(where)
    shapes = {name: v.shape for name, v in bundle.variables.items() if not OPTIMISER.match(name)}
    model = outline(_sizes(shapes, where))
    rows = _rows(model)
    check_shapes(shapes, _expected(rows, model.config), where)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(rows[name].turn(*(_read(bundle, theirs) for theirs in rows[name].names)))
    return model.eval()


def _read(bundle: Bundle, name: str) -> Tensor:
    value = torch.from_numpy(bundle.read(name).copy())
    check_finite(name, value, bundle.prefix)
    return value


def _rows(model: ImageGPT) -> dict[str, TensorMapping]:
    """The table's row for each of the network's weights."""
    rows = {}
    for ours, _ in model.named_parameters():
        row, block = row_of(ours)
        rows[ours] = TABLE[row]._replace(names=tuple(name.replace("#", block) for name in TABLE[row].names))
    return rows


def _expected(rows: dict[str, TensorMapping], c: ModelConfig) -> dict[str, Shape]:
    sizes = {"T": c.n_positions, "V": c.n_vocab, "C": c.n_embd, "4C": 4 * c.n_embd}
    sizes |= {"N": c.n_head, "D": c.n_embd // c.n_head}
    return {name: tuple(sizes[s] for s in row.shape.split()) for row in rows.values() for name in row.names}


def _sizes(shapes: dict[str, Shape], where: str) -> ModelConfig:
    for name, axes in (("model/wpe", 2), ("model/wte", 2), ("model/h0/attn/q_proj", 3)):
        if name not in shapes:
            raise CheckpointError(f"{where} lacks {name}: is it a checkpoint of Image GPT?")
        if len(shapes[name]) != axes:
            raise CheckpointError(f"{where}: {name} is {shapes[name]}, expected {axes} axes")
    n_positions, n_embd = shapes["model/wpe"]
    n_px = math.isqrt(n_positions)
    if n_px**2 != n_positions:
        raise CheckpointError(f"{where}: model/wpe has {n_positions} positions, which make no square picture")
    blocks = [int(match[1]) for name in shapes if (match := re.match(r"model/h(\d+)/", name))]
    try:
        return ModelConfig(
            objective="next" if "model/sos" in shapes else "masked",
            n_layer=len(set(blocks)),
            n_embd=n_embd,
            n_head=shapes["model/h0/attn/q_proj"][0],
            n_px=n_px,
            n_vocab=shapes["model/wte"][0],
        )
    except ValidationError as error:
        raise CheckpointError(f"{where} has sizes that no network has: {error.errors()[0]['msg']}") from error
