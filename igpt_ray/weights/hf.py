"""Read and write ImageGPT folders of transformers, without transformers.

    <folder>/model.safetensors          or several files, listed in model.safetensors.index.json
    <folder>/config.json                written last
    <folder>/preprocessor_config.json   settings of the image processor; `clusters` is the palette

Only safetensors is read, because pytorch_model.bin is a pickle, which can run code. The model of transformers has
biases in the linear layers of a block; ours has none, so they must be zero. It embeds the start vector as token V; ours
stores it as `sos`. It has no masked objective.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpt_ray import artifact, storage
from igpt_ray.data.palette import Palette
from igpt_ray.errors import CheckpointError, NotFound
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import NORM_EPS, ImageGPT, outline
from igpt_ray.weights.check import Shape, check_finite, check_shapes, config_from_sizes, shapes_of

WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"


RENAMED = {"wpe": "transformer.wpe.weight", "wtet.weight": "lm_head.weight"}
"""Our name -> the name in transformers, where it is not our name after `transformer.`."""
EMBEDDING = "transformer.wte.weight"
"""Our wte, with our sos as the last row."""
CONV1D = ".c_"
"""Part of the names of weights that belong to a Conv1D: stored as [in, out], with a bias."""
BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)$")
"""Causal masks, which older versions of transformers stored."""

FIXED: dict[str, Any] = {
    "activation_function": "quick_gelu",
    "layer_norm_epsilon": NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": False,
    "add_cross_attention": False,
}
"""Values that config.json must have, because our model implements no others. They are also the defaults."""

PUBLISHED_HEADS = {512: 8, 1024: 8, 1536: 16}
"""n_embd -> n_head of iGPT-S, -M and -L."""


# ------------------------------------------------------------------------------------------------ load


def load_hf(source: str | Path | Mapping[str, Tensor], n_head: int | None = None) -> ImageGPT:
    """Load a folder (path or URI) or a state dict, in evaluation mode.

    The keys of a state dict may lack the prefix `transformer.`. A state dict does not contain the number of heads:
    without `n_head`, its width must be that of iGPT-S, -M or -L. Raises `CheckpointError` if a weight is missing,
    unexpected, of another shape or not finite, if a bias is not zero, or if the weights are a pickle.
    """
    if isinstance(source, Mapping):
        where, theirs, config = "the state dict", dict(source), None
    else:
        where = storage.absolute(str(source))
        config = _read_json(where, CONFIG)
        n_head = _heads_in(config, where, n_head)
        theirs = _read_tensors(where)
    tensors = _weights(theirs, where)
    model = outline(_sizes(tensors, where, n_head))
    check_shapes(shapes_of(tensors), _expected(model), where)
    if config is not None:
        _check_folder(where, config, model.config)
    for name, value in tensors.items():
        check_finite(name, value, where)
        if name.endswith(".bias") and value.any():
            raise CheckpointError(
                f"{where}: {name} is not zero, but our model has no biases: weights that were fine-tuned with"
                " transformers cannot be converted"
            )
    model.to_empty(device="cpu")
    model.load_state_dict(_ours(tensors, model))
    return model.eval()


def _weights(theirs: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights without buffers, with the prefix in every name."""
    whole = ("transformer.", "lm_head.")
    tensors = {name if name.startswith(whole) else f"transformer.{name}": value for name, value in theirs.items()}
    if len(tensors) < len(theirs):
        raise CheckpointError(f"{where} has the same weight with and without the prefix 'transformer.'")
    tensors = {name: value for name, value in tensors.items() if not BUFFERS.match(name)}
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise CheckpointError(f"{where}: {name} is not a floating-point tensor")
    return tensors


def palette_of(folder: str) -> Palette | None:
    """The palette in the image processor's settings; None if there is none."""
    if not storage.exists(storage.join(folder, PROCESSOR)):
        return None
    clusters = _read_json(folder, PROCESSOR).get("clusters")
    try:
        return None if clusters is None else Palette(torch.tensor(clusters, dtype=torch.float32).numpy())
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}/{PROCESSOR}: its clusters are not a palette: {error}") from error


def _ours(tensors: dict[str, Tensor], model: ImageGPT) -> dict[str, Tensor]:
    wte, sos = tensors[EMBEDDING].split([model.config.n_vocab, 1])
    converted = {ours: tensors[name].T if CONV1D in name else tensors[name] for ours, name in _names(model).items()}
    return converted | {"wte.weight": wte, "sos": sos[0]}


def _names(model: ImageGPT) -> dict[str, str]:
    """The name in transformers of each of the model's weights, except wte and sos."""
    ours = [name for name, _ in model.named_parameters() if name not in ("wte.weight", "sos")]
    return {name: RENAMED.get(name, f"transformer.{name}") for name in ours}


def _expected(model: ImageGPT) -> dict[str, Shape]:
    """The shapes of the tensors of transformers, biases included."""
    own = shapes_of(model.state_dict())
    shapes: dict[str, Shape] = {EMBEDDING: (model.config.n_vocab + 1, model.config.n_embd)}
    for ours, name in _names(model).items():
        shapes[name] = own[ours]
        if CONV1D in name:
            shapes |= {name: own[ours][::-1], _bias_of(name): own[ours][:1]}
    return shapes


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _sizes(tensors: dict[str, Tensor], where: str, n_head: int | None) -> ModelConfig:
    for name in (EMBEDDING, RENAMED["wpe"]):
        if name not in tensors:
            raise CheckpointError(f"{where} lacks {name}: is it an ImageGPTForCausalImageModeling of transformers?")
        if tensors[name].ndim != 2:
            raise CheckpointError(f"{where}: {name} is {tuple(tensors[name].shape)}, expected 2 axes")
    n_positions, n_embd = tensors[RENAMED["wpe"]].shape
    if n_head is None and n_embd not in PUBLISHED_HEADS:
        raise CheckpointError(
            f"{where} does not contain the number of heads, and {n_embd} is not the width of iGPT-S, -M or -L:"
            " set n_head"
        )
    blocks = {match[1] for name in tensors if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    return config_from_sizes(
        where,
        RENAMED["wpe"],
        n_positions,
        n_layer=len(blocks),
        n_embd=n_embd,
        n_head=PUBLISHED_HEADS[n_embd] if n_head is None else n_head,
        n_vocab=len(tensors[EMBEDDING]) - 1,
    )


def _read_json(folder: str, name: str) -> dict[str, Any]:
    messages = f"{folder} is not a transformers folder: it has no {name}", f"{folder}/{name} is not JSON"
    content: Any = artifact.load(storage.join(folder, name), json.loads, CheckpointError, *messages)
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder}/{name} is not a JSON object")
    return content


def _heads_in(theirs: dict[str, Any], where: str, n_head: int | None) -> int:
    """The number of heads in config.json, after a check that our model implements the other settings."""
    if theirs.get("model_type") != "imagegpt":
        raise CheckpointError(f"{where}/{CONFIG} has the model_type {theirs.get('model_type')!r}, expected 'imagegpt'")
    for name, value in FIXED.items():
        if theirs.get(name, value) != value:
            raise CheckpointError(f"{where}/{CONFIG}: {name} is {theirs[name]!r}, ImageGPT has {value!r}")
    heads = theirs.get("n_head", 8)  # transformers leaves defaults out
    if not isinstance(heads, int) or (n_head is not None and n_head != heads):
        raise CheckpointError(f"{where}/{CONFIG}: n_head is {heads!r}, expected {n_head or 'a number'}")
    return heads


def _check_folder(where: str, theirs: dict[str, Any], model: ModelConfig) -> None:
    """Check that config.json and the palette have the same sizes as the weights."""
    sizes = {"n_layer": model.n_layer, "n_embd": model.n_embd, "n_positions": model.n_positions}
    for name, value in (sizes | {"vocab_size": model.n_vocab + 1, "n_inner": 4 * model.n_embd}).items():
        if theirs.get(name) not in (None, value):
            raise CheckpointError(f"{where}/{CONFIG}: {name} is {theirs[name]!r}, but its weights have {value}")
    palette = palette_of(where)
    if palette is not None and len(palette) != model.n_vocab:
        raise CheckpointError(
            f"{where}/{PROCESSOR} has {len(palette)} clusters, but its weights have a vocabulary of {model.n_vocab}"
        )


def _read_tensors(folder: str) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from several."""
    index = f"{WEIGHTS}.index.json"
    if storage.exists(storage.join(folder, WEIGHTS)):
        return _load_safetensors(folder, WEIGHTS)
    if not storage.exists(storage.join(folder, index)):
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}. Only safetensors is read: a .bin is a pickle, which can run code. If you trust"
            " it, load it with transformers and save it with save_pretrained, which writes safetensors"
        )
    places = _read_json(folder, index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) and "/" not in f for f in places.values()):
        raise CheckpointError(f"{folder}/{index} is not an index of transformers: it lacks a weight_map of file names")
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


# ------------------------------------------------------------------------------------------------ save


def save_hf(model: ImageGPT, folder: str | Path, palette: Palette | None = None) -> None:
    """Write a folder for `ImageGPTForCausalImageModeling.from_pretrained`; with a palette also for its image processor.

    Raises `CheckpointError` if the model has parts that transformers' ImageGPT does not have.
    """
    uri, c = storage.absolute(str(folder)), model.config
    extra = ["masked network"] * (c.objective != "next") + ["class head"] * (c.n_class > 0) + c.modern
    if extra:
        raise CheckpointError(f"transformers' ImageGPT has no {', '.join(extra)}: keep the release")
    if palette is not None and len(palette) != c.n_vocab:
        raise CheckpointError(f"the palette has {len(palette)} colours, the model a vocabulary of {c.n_vocab}")
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
    for ours, name in _names(model).items():
        theirs[name] = own[ours]
        if CONV1D in name:
            theirs |= {name: own[ours].T.contiguous(), _bias_of(name): torch.zeros(len(own[ours]))}
    return theirs


def _config(c: ModelConfig) -> dict[str, Any]:
    """The content of config.json. Dropout is zero, as in OpenAI's training; transformers' default is 0.1."""
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
    """Settings of transformers' image processor: resize to n_px, scale to [-1, 1], quantise to the nearest cluster.

    Its resize matches none of our pixel pipelines, so its tokens differ slightly from the training tokens.
    """
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
