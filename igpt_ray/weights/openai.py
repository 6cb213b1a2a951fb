"""Convert OpenAI's TensorFlow checkpoints to ImageGPT. TensorFlow is not needed.

A checkpoint without a start vector (`model/sos`) is a masked ("BERT") model. All sizes follow from the shapes.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from igpt_ray import storage
from igpt_ray.errors import CheckpointError
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT, outline
from igpt_ray.weights.check import Shape, check_finite, check_shapes, config_from_sizes
from igpt_ray.weights.tf_bundle import Bundle


def _transposed(w: Tensor) -> Tensor:
    """OpenAI's `conv1d` weights are [in, out]; those of torch's Linear are [out, in]."""
    return w.T


def _heads_to_rows(*heads: Tensor) -> Tensor:
    """Each (N, D, C), used as `bsf,hef->bhse`, becomes (N*D, C), the [out, in] of a Linear; all are concatenated."""
    return torch.cat([w.flatten(0, 1) for w in heads])


def _heads_to_columns(w: Tensor) -> Tensor:
    """(N, D, C), used as `bhse,hef->bsf`, becomes (C, N*D): heads and their width are the input."""
    return w.flatten(0, 1).T


class TensorMapping(NamedTuple):
    """OpenAI's variables for one of our weights, the shape of each, and the conversion."""

    names: tuple[str, ...]
    shape: str
    convert: Callable[..., Tensor] = lambda w: w


TABLE = {
    "wpe": TensorMapping(("model/wpe",), "T C"),
    "wte.weight": TensorMapping(("model/wte",), "V C"),
    "wtet.weight": TensorMapping(("model/wtet",), "V C"),
    "sos": TensorMapping(("model/sos",), "C"),
    "ln_f.weight": TensorMapping(("model/ln_f/g",), "C"),
    "h.#.ln_1.weight": TensorMapping(("model/h#/ln_1/g",), "C"),
    "h.#.attn.c_attn.weight": TensorMapping(
        ("model/h#/attn/q_proj", "model/h#/attn/k_proj", "model/h#/attn/v_proj"), "N D C", _heads_to_rows
    ),
    "h.#.attn.c_proj.weight": TensorMapping(("model/h#/attn/c_proj",), "N D C", _heads_to_columns),
    "h.#.ln_2.weight": TensorMapping(("model/h#/ln_2/g",), "C"),
    "h.#.mlp.c_fc.weight": TensorMapping(("model/h#/mlp/c_fc/w",), "C 4C", _transposed),
    "h.#.mlp.c_proj.weight": TensorMapping(("model/h#/mlp/c_proj/w",), "4C C", _transposed),
}
"""Our name -> OpenAI's names; # is a block number. Shapes use the letters of `_expected`."""

OPTIMISER = re.compile(r"(?!model/)|.*/Adam(_1)?$")
"""Names of optimiser state: Adam's moments and powers, and the step."""


def load_openai(prefix: str | Path) -> ImageGPT:
    """Load a checkpoint, in evaluation mode. `prefix` is its path or URI without `.index`.

    Raises `CheckpointError` if a weight is missing, unexpected, of another shape or not finite, or a file is damaged.
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
            parameter.copy_(rows[name].convert(*(_read(bundle, variable) for variable in rows[name].names)))
    return model.eval()


def _read(bundle: Bundle, name: str) -> Tensor:
    value = torch.from_numpy(bundle.read(name).copy())
    check_finite(name, value, bundle.prefix)
    return value


def _rows(model: ImageGPT) -> dict[str, TensorMapping]:
    """The mapping of each of the model's weights."""
    rows = {}
    for ours, _ in model.named_parameters():
        block = re.match(r"h\.(\d+)\.", ours)
        row = TABLE[ours if block is None else ours.replace(block[1], "#", 1)]
        rows[ours] = row if block is None else row._replace(names=tuple(n.replace("#", block[1]) for n in row.names))
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
    blocks = {match[1] for name in shapes if (match := re.match(r"model/h(\d+)/", name))}
    return config_from_sizes(
        where,
        "model/wpe",
        n_positions,
        objective="next" if "model/sos" in shapes else "masked",
        n_layer=len(blocks),
        n_embd=n_embd,
        n_head=shapes["model/h0/attn/q_proj"][0],
        n_vocab=shapes["model/wte"][0],
    )
