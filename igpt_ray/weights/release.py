"""Releases: the format in which models are served, evaluated and shared. It contains no pickle.

<release>/model.safetensors   float32 weights, named as in model/image_gpt.py
<release>/palette.npy
<release>/README.md           model card
<release>/config.json         model settings, token format, training; written last, which commits the release
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpt_ray import artifact, storage
from igpt_ray.data.palette import Palette
from igpt_ray.data.pixels import settings_hint
from igpt_ray.data.token_format import Strict, TokenFormat
from igpt_ray.errors import CheckpointError
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT, outline
from igpt_ray.weights.check import check_finite, check_shapes, shapes_of

FORMAT = "igpt_ray release 1"


class ReleaseConfig(Strict):
    format: str
    model: ModelConfig
    kind: TokenFormat
    """Format of the tokens that the model was trained on."""
    sha256: str
    """SHA-256 of model.safetensors."""
    classes: list[str]
    trained: dict[str, Any]
    """Steps and last loss in nats per token, or the source of a conversion; settings and versions."""


@dataclass(frozen=True)
class Release:
    model: ImageGPT
    palette: Palette
    config: ReleaseConfig


def check_kind(trained: TokenFormat, kind: TokenFormat, where: str, who: str = "the release") -> None:
    """Raises `CheckpointError` unless `kind` equals `trained`, the format of the training tokens."""
    for field in TokenFormat.model_fields:
        ours, theirs = getattr(trained, field), getattr(kind, field)
        if ours != theirs:
            hint = f" ({settings_hint(trained.pipeline)})" if field == "pipeline" else ""
            raise CheckpointError(
                f"{who} was trained with {field} {ours}, but {where} has {theirs}:"
                f" use or prepare a token store of the same format{hint}"
            )


def check_next(config: ReleaseConfig, where: str) -> None:
    """Raises `CheckpointError` for a masked model, which defines no likelihood and cannot complete images."""
    if config.model.objective != "next":
        raise CheckpointError(
            f"{where} is a masked model: completions, scores and the server need a model of the objective 'next';"
            " jobs/evaluate.py and jobs/probe.py accept both"
        )


def save_release(uri: str, weights: dict[str, Tensor], palette: Palette, config: ReleaseConfig) -> None:
    """Write a release. `config.sha256` is replaced by the hash of the weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file({name: t.float().contiguous() for name, t in weights.items()}, path)
        config = config.model_copy(update={"sha256": artifact.sha256_of(path)})
        storage.upload(path, storage.join(uri, "model.safetensors"))
    palette.save(storage.join(uri, "palette.npy"))
    storage.write(storage.join(uri, "README.md"), _card(config).encode())
    storage.write(storage.join(uri, "config.json"), (config.model_dump_json(indent=1) + "\n").encode())


def load_config(uri: str) -> ReleaseConfig:
    """Read config.json. Raises `CheckpointError` if it is missing, malformed or of another version."""
    missing = f"no release at {uri}: expected the release/ folder of a run"
    damaged = f"{uri}/config.json is not a release of this version"
    parse = ReleaseConfig.model_validate_json
    config = artifact.load(storage.join(uri, "config.json"), parse, CheckpointError, missing, damaged)
    if config.format != FORMAT:
        raise CheckpointError(f"{uri} is {config.format!r}; this version reads {FORMAT!r}")
    for field in ("n_px", "n_vocab"):
        ours, theirs = getattr(config.model, field), getattr(config.kind, field)
        if ours != theirs:
            raise CheckpointError(
                f"{uri}/config.json is inconsistent: {field} is {ours} for the model, but {theirs} for its tokens"
            )
    return config


def load_release(uri: str, device: str = "cpu") -> Release:
    """Load the model in evaluation mode on `device`, with its palette.

    Raises `CheckpointError` if a file is damaged, or a weight is missing, unexpected, of another shape or not finite.
    """
    config = load_config(uri)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        artifact.download(storage.join(uri, "model.safetensors"), path, config.sha256, CheckpointError)
        try:
            weights = load_file(path, device=device)
        except SafetensorError as error:
            raise CheckpointError(f"{uri}/model.safetensors is not a safetensors file: {error}") from error
    palette = Palette.load(storage.join(uri, "palette.npy"))
    if palette.fingerprint != config.kind.palette:
        raise CheckpointError(f"{uri}/palette.npy is not the palette that the model was trained with")
    model = outline(config.model)
    check_shapes(shapes_of(weights), shapes_of(model.state_dict()), uri)
    for name, value in weights.items():
        check_finite(name, value, uri)
    model.to_empty(device=device).load_state_dict(weights)
    return Release(model.eval(), palette, config)


def _card(config: ReleaseConfig) -> str:
    m, k = config.model, config.kind
    objective = "Autoregressive" if m.objective == "next" else "Masked"
    history = "\n".join(f"| {name} | {value} |" for name, value in _history(config).items())
    return f"""# ImageGPT, {m.n_layer} layers x {m.n_embd}, {m.n_px}x{m.n_px}, {m.n_vocab} colours

{objective} model of pixels ("Generative Pretraining from Pixels", Chen et al., 2020), written by igpt_ray.

| | |
|---|---|
| parameters | {m.n_params:,} |
| not in the paper | {", ".join(m.modern) or "nothing"} |
{history}
| palette | sha256 {k.palette[:16]} |
| pixel pipeline | {k.pipeline} |
| classes in the data | {len(config.classes)} |

Weights are in `model.safetensors`, settings and versions in `config.json`. The model reproduces its training
images' content and biases.
"""


def _history(config: ReleaseConfig) -> dict[str, str]:
    """Rows of the model card about the origin of the weights."""
    trained, token = config.trained, "token" if config.model.objective == "next" else "masked token"
    if origin := trained.get("converted_from"):
        return {
            "converted from": str(origin),
            "pixel pipeline in training": "unknown; the one below was set at the conversion",
        }
    nats = trained.get("nats_per_token")
    return {
        "steps": str(trained.get("steps")),
        f"training nats per {token}, last line": str(nats if nats is None else f"{nats:.4f}"),
    }
