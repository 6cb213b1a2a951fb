"""transformers' ImageGPT folders, in and out. Neither way needs transformers.

    <folder>/model.safetensors          or several, listed in model.safetensors.index.json
    <folder>/config.json                written last
    <folder>/preprocessor_config.json   settings of its image processor; `clusters` is the palette

Only safetensors is read: pytorch_model.bin is a pickle, which can run code. The network has a bias in every linear
layer of a block and feeds its start vector as token V; ours has neither, so that biases must be zero and row V of the
embedding is `sos`. It has no masked objective.
"""

import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpt_ray import storage
from igpt_ray.data.palette import Palette
from igpt_ray.errors import CheckpointError, NotFound
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import NORM_EPS, ImageGPT
from igpt_ray.weights.check import Shape, check_finite, check_shapes, outline, row_of, shapes_of

WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"


class TensorMapping(NamedTuple):
    """One of their tensors, and whether it lies as a Conv1D: [in, out], and with a bias beside it."""

    name: str
    conv1d: bool = False


TABLE = {
    "wpe": TensorMapping("transformer.wpe.weight"),
    "ln_f.weight": TensorMapping("transformer.ln_f.weight"),
    "wtet.weight": TensorMapping("lm_head.weight"),
    "h.#.ln_1.weight": TensorMapping("transformer.h.#.ln_1.weight"),
    "h.#.attn.c_attn.weight": TensorMapping("transformer.h.#.attn.c_attn.weight", conv1d=True),
    "h.#.attn.c_proj.weight": TensorMapping("transformer.h.#.attn.c_proj.weight", conv1d=True),
    "h.#.ln_2.weight": TensorMapping("transformer.h.#.ln_2.weight"),
    "h.#.mlp.c_fc.weight": TensorMapping("transformer.h.#.mlp.c_fc.weight", conv1d=True),
    "h.#.mlp.c_proj.weight": TensorMapping("transformer.h.#.mlp.c_proj.weight", conv1d=True),
}
"""Our name -> theirs; # is the number of a block. Beside these stands EMBEDDING, which is our wte and sos."""

EMBEDDING = "transformer.wte.weight"
BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)$")
"""Causal masks, which older versions stored."""

FIXED: dict[str, Any] = {
    "activation_function": "quick_gelu",
    "layer_norm_epsilon": NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": False,
    "add_cross_attention": False,
}
"""What must stand so in their config for the network to be ours; left out, it does."""

PUBLISHED_HEADS = {512: 8, 1024: 8, 1536: 16}
"""Heads of iGPT-S, -M and -L by their width."""


# ------------------------------------------------------------------------------------------------ in


def load_hf(source: str | Path | Mapping[str, Tensor], n_head: int | None = None) -> ImageGPT:
    """The network of a folder (path or URI), or of a state dict, in evaluation mode.

    The keys of a state dict may lack the prefix `transformer.`. It does not tell the number of heads: without `n_head`
    it must have the width of iGPT-S, -M or -L, whose heads are known. Raises `CheckpointError` if anything is missing,
    left over, of another shape or not finite, if a bias is not zero, or if the weights are a pickle.
    """
    if isinstance(source, Mapping):
        where, theirs = "the state dict", dict(source)
    else:
        where = storage.absolute(str(source))
        n_head = _heads_in(_read_json(where, CONFIG), where, n_head)
        theirs = _read_tensors(where)
    found = _weights(theirs, where)
    model = outline(_sizes(found, where, n_head))
    check_shapes(shapes_of(found), _expected(model), where)
    if not isinstance(source, Mapping):
        _check_folder(where, model.config)
    for name, value in found.items():
        check_finite(name, value, where)
        if name.endswith(".bias") and value.any():
            raise CheckpointError(
                f"{where}: {name} is not zero, and our network has no biases: what transformers trained further cannot"
                " be carried over"
            )
    model.to_empty(device="cpu")
    model.load_state_dict(_ours(found, model))
    return model.eval()


def _weights(theirs: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Without buffers, all names with the prefix."""
    found = {_prefixed(name): value for name, value in theirs.items()}
    if len(found) < len(theirs):
        raise CheckpointError(f"{where} holds the same weight with and without the prefix 'transformer.'")
    found = {name: value for name, value in found.items() if not BUFFERS.match(name)}
    for name, value in found.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise CheckpointError(f"{where}: {name} is no tensor of floating-point numbers")
    return found


def palette_of(folder: str) -> Palette | None:
    """The palette in the processor's settings; None if there are none."""
    if not storage.exists(storage.join(folder, PROCESSOR)):
        return None
    clusters = _read_json(folder, PROCESSOR).get("clusters")
    try:
        return None if clusters is None else Palette(torch.tensor(clusters, dtype=torch.float32).numpy())
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}/{PROCESSOR}: its clusters are no palette: {error}") from error


def _ours(found: dict[str, Tensor], model: ImageGPT) -> dict[str, Tensor]:
    wte, sos = found[EMBEDDING].split([model.config.n_vocab, 1])
    rows = _rows(model)
    converted = {ours: found[row.name].T if row.conv1d else found[row.name] for ours, row in rows.items()}
    return converted | {"wte.weight": wte, "sos": sos[0]}


def _rows(model: ImageGPT) -> dict[str, TensorMapping]:
    """The table's row for each of the network's weights but wte and sos."""
    rows = {}
    for ours, _ in model.named_parameters():
        if ours not in ("wte.weight", "sos"):
            row, block = row_of(ours)
            rows[ours] = TABLE[row]._replace(name=TABLE[row].name.replace("#", block))
    return rows


def _expected(model: ImageGPT) -> dict[str, Shape]:
    """Their shapes, biases included."""
    own = shapes_of(model.state_dict())
    shapes: dict[str, Shape] = {EMBEDDING: (model.config.n_vocab + 1, model.config.n_embd)}
    for ours, (name, conv1d) in _rows(model).items():
        shapes[name] = own[ours][::-1] if conv1d else own[ours]
        if conv1d:
            shapes[_bias_of(name)] = own[ours][:1]
    return shapes


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _prefixed(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _sizes(found: dict[str, Tensor], where: str, n_head: int | None) -> ModelConfig:
    for name in (EMBEDDING, TABLE["wpe"].name):
        if name not in found:
            raise CheckpointError(f"{where} lacks {name}: is it an ImageGPTForCausalImageModeling of transformers?")
        if found[name].ndim != 2:
            raise CheckpointError(f"{where}: {name} is {tuple(found[name].shape)}, expected 2 axes")
    n_positions, n_embd = found[TABLE["wpe"].name].shape
    n_px = math.isqrt(n_positions)
    if n_px**2 != n_positions:
        raise CheckpointError(f"{where}: transformer.wpe.weight has {n_positions} positions, no square picture")
    if n_head is None and n_embd not in PUBLISHED_HEADS:
        raise CheckpointError(
            f"{where} does not tell its number of heads, and a width of {n_embd} is not that of iGPT-S, -M or -L:"
            " give it as n_head"
        )
    blocks = {match[1] for name in found if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    try:
        return ModelConfig(
            n_layer=len(blocks),
            n_embd=n_embd,
            n_head=PUBLISHED_HEADS[n_embd] if n_head is None else n_head,
            n_px=n_px,
            n_vocab=len(found[EMBEDDING]) - 1,
        )
    except ValidationError as error:
        raise CheckpointError(f"{where} has sizes that no network has: {error.errors()[0]['msg']}") from error


def _read_json(folder: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(storage.read(storage.join(folder, name)))
    except NotFound as error:
        raise CheckpointError(f"no folder of transformers at {folder}: it has no {name} ({error})") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}/{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder}/{name} is not what transformers writes")
    return content


def _heads_in(theirs: dict[str, Any], where: str, n_head: int | None) -> int:
    """The number of heads in their config, once it is sure that the network is ours."""
    if theirs.get("model_type") != "imagegpt":
        raise CheckpointError(f"{where}/{CONFIG} is of a {theirs.get('model_type')!r}, expected 'imagegpt'")
    for name, value in FIXED.items():
        if theirs.get(name, value) != value:
            raise CheckpointError(f"{where}/{CONFIG}: {name} is {theirs[name]!r}, ImageGPT has {value!r}")
    heads = theirs.get("n_head", 8)  # transformers leaves defaults out
    if not isinstance(heads, int) or (n_head is not None and n_head != heads):
        raise CheckpointError(f"{where}/{CONFIG}: n_head is {heads!r}, expected {n_head or 'a number'}")
    return heads


def _check_folder(where: str, model: ModelConfig) -> None:
    """Its config and its palette tell of the same sizes as its weights."""
    theirs = _read_json(where, CONFIG)
    sizes = {"n_layer": model.n_layer, "n_embd": model.n_embd, "n_positions": model.n_positions}
    for name, value in (sizes | {"vocab_size": model.n_vocab + 1, "n_inner": 4 * model.n_embd}).items():
        if theirs.get(name) not in (None, value):
            raise CheckpointError(f"{where}/{CONFIG}: {name} is {theirs[name]!r}, but its weights have {value}")
    palette = palette_of(where)
    if palette is not None and len(palette) != model.n_vocab:
        raise CheckpointError(
            f"{where}/{PROCESSOR} has {len(palette)} clusters, but its weights a vocabulary of {model.n_vocab} colours"
        )


def _read_tensors(folder: str) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from several."""
    index = f"{WEIGHTS}.index.json"
    if storage.exists(storage.join(folder, WEIGHTS)):
        return _load_safetensors(folder, WEIGHTS)
    if not storage.exists(storage.join(folder, index)):
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}. Only safetensors is read: a .bin is a pickle, which can run code. If you trust"
            " it, let transformers load and save it again: save_pretrained writes safetensors"
        )
    places = _read_json(folder, index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) and "/" not in f for f in places.values()):
        raise CheckpointError(f"{folder}/{index} is not what transformers writes: it lacks a weight_map of file names")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        tensors |= _load_safetensors(folder, file)
    return tensors


def _load_safetensors(folder: str, name: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, name)
        try:
            storage.download(storage.join(folder, name), path)
            return load_file(path)
        except NotFound as error:
            raise CheckpointError(f"{folder}/{name} is missing") from error
        except SafetensorError as error:
            raise CheckpointError(f"{folder}/{name} is not a safetensors file: {error}") from error


# ------------------------------------------------------------------------------------------------ out


def save_hf(model: ImageGPT, folder: str | Path, palette: Palette | None = None) -> None:
    """Write the network so that `ImageGPTForCausalImageModeling.from_pretrained` reads it; with a palette also the
    settings of its image processor. Raises `CheckpointError` if transformers has no such network."""
    uri, c = storage.absolute(str(folder)), model.config
    if c.objective != "next" or c.n_class:
        kind = "masked network" if c.objective != "next" else "class head"
        raise CheckpointError(f"transformers' ImageGPT has no {kind}: keep it as a release")
    if c.modern:
        raise CheckpointError(f"transformers' ImageGPT has no {', '.join(c.modern)}: keep it as a release")
    if palette is not None and len(palette) != c.n_vocab:
        raise CheckpointError(f"the palette has {len(palette)} colours, the network a vocabulary of {c.n_vocab}")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, WEIGHTS)
        save_file(_tensors(model), path, metadata={"format": "pt"})
        storage.upload(path, storage.join(uri, WEIGHTS))
    if palette is not None:
        storage.write(storage.join(uri, PROCESSOR), _json(_processor(c, palette)))
    storage.write(storage.join(uri, CONFIG), _json(_config(c)))


def _tensors(model: ImageGPT) -> dict[str, Tensor]:
    own = {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
    theirs = {EMBEDDING: torch.cat([own["wte.weight"], own["sos"][None]])}
    for ours, (name, conv1d) in _rows(model).items():
        theirs[name] = (own[ours].T if conv1d else own[ours]).contiguous()
        if conv1d:
            theirs[_bias_of(name)] = torch.zeros(len(own[ours]))
    return theirs


def _config(c: ModelConfig) -> dict[str, Any]:
    """Dropout is written as zero, or fine-tuning there would drop what OpenAI never did."""
    return {
        "architectures": ["ImageGPTForCausalImageModeling"],
        "model_type": "imagegpt",
        "vocab_size": c.n_vocab + 1,
        "n_positions": c.n_positions,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **FIXED,
        "dtype": "float32",
    }


def _processor(c: ModelConfig, palette: Palette) -> dict[str, Any]:
    """A picture is resized to n_px, scaled to [-1, 1], and each pixel becomes the nearest cluster. Its resize is none
    of our pixel pipelines: tokens made there differ a little from those the network was trained on."""
    return {
        "image_processor_type": "ImageGPTImageProcessor",
        "do_resize": True,
        "size": {"height": c.n_px, "width": c.n_px},
        "resample": 2,
        "do_normalize": True,
        "do_color_quantize": True,
        "clusters": palette.colours.tolist(),
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
