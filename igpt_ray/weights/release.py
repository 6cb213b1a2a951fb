"""Releases: the one form in which a model is served, scored and shared. No pickle on this path.

<release>/model.safetensors   float32 weights, named as in model.py
<release>/palette.npy
<release>/README.md           model card
<release>/config.json         shape, palette, pixel pipeline, training; written last: the commit
"""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpt_ray import storage
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_format import Strict, TokenFormat
from igpt_ray.errors import CheckpointError, NotFound
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.weights.check import check_finite, check_shapes, outline, shapes_of

FORMAT = "igpt_ray release 1"


class ReleaseConfig(Strict):
    format: str
    model: ModelConfig
    kind: TokenFormat
    """What the tokens it was trained on mean."""
    sha256: str
    """Of model.safetensors."""
    classes: list[str]
    trained: dict[str, Any]
    """Steps and last nats per token, or what it was converted from; settings, versions."""


@dataclass(frozen=True)
class Release:
    model: ImageGPT
    palette: Palette
    config: ReleaseConfig


def check_kind(trained: TokenFormat, kind: TokenFormat, where: str, who: str = "the release") -> None:
    """Raises `CheckpointError` unless tokens of this kind are what it was trained on."""
    for field in TokenFormat.model_fields:
        ours, theirs = getattr(trained, field), getattr(kind, field)
        if ours != theirs:
            raise CheckpointError(
                f"{who} was trained with {field} {ours}, but {where} has {theirs}:"
                " use the token store (or prepare one) of the same kind"
            )


def check_next(about: ReleaseConfig, where: str) -> None:
    """Raises `CheckpointError` for a masked network: it finishes no picture, and gives none a probability."""
    if about.model.objective != "next":
        raise CheckpointError(
            f"{where} is a masked network: completions, scores and the server need one that predicts the next pixel;"
            " jobs/evaluate.py and jobs/probe.py take both"
        )


def save_release(uri: str, weights: dict[str, Tensor], palette: Palette, about: ReleaseConfig) -> None:
    """Write a release; `about.sha256` is filled in here."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file({name: t.float().contiguous() for name, t in weights.items()}, path)
        about = about.model_copy(update={"sha256": _sha256(path)})
        storage.upload(path, storage.join(uri, "model.safetensors"))
    palette.save(storage.join(uri, "palette.npy"))
    storage.write(storage.join(uri, "README.md"), _card(about).encode())
    storage.write(storage.join(uri, "config.json"), (about.model_dump_json(indent=1) + "\n").encode())


def load_config(uri: str) -> ReleaseConfig:
    """Raises `CheckpointError` if there is no release, or not one of ours."""
    try:
        data = storage.read(storage.join(uri, "config.json"))
    except NotFound as error:
        raise CheckpointError(f"no release at {uri}: expected the release/ folder of a run ({error})") from error
    try:
        about = ReleaseConfig.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{uri}/config.json is not a release of this version: {error.errors()[0]}") from error
    if about.format != FORMAT:
        raise CheckpointError(f"{uri} is {about.format!r}; this version reads {FORMAT!r}")
    for field in ("n_px", "n_vocab"):
        ours, theirs = getattr(about.model, field), getattr(about.kind, field)
        if ours != theirs:
            raise CheckpointError(
                f"{uri}/config.json contradicts itself: {field} of the model is {ours}, of its tokens {theirs}"
            )
    return about


def load_release(uri: str, device: str = "cpu") -> Release:
    """The model in evaluation mode on `device`, with its palette. Raises `CheckpointError` if anything is damaged,
    missing, left over, of another shape, or not finite."""
    about = load_config(uri)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        storage.download(storage.join(uri, "model.safetensors"), path)
        if _sha256(path) != about.sha256:
            raise CheckpointError(f"{uri}/model.safetensors is damaged: its sha256 is not the one in config.json")
        try:
            weights = load_file(path, device=device)
        except SafetensorError as error:
            raise CheckpointError(f"{uri}/model.safetensors is not a safetensors file: {error}") from error
    palette = Palette.load(storage.join(uri, "palette.npy"))
    if palette.fingerprint != about.kind.palette:
        raise CheckpointError(f"{uri}/palette.npy is not the palette that the model was trained with")
    model = outline(about.model)
    load_weights(model, weights, uri, device)
    return Release(model.eval(), palette, about)


def load_weights(model: ImageGPT, weights: dict[str, Tensor], where: str, device: str) -> None:
    """Fill the outline of a model: every name, every shape, every value finite."""
    check_shapes(shapes_of(weights), shapes_of(model.state_dict()), where)
    for name, value in weights.items():
        check_finite(name, value, where)
    model.to_empty(device=device).load_state_dict(weights)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _card(about: ReleaseConfig) -> str:
    m, k = about.model, about.kind
    objective = "Autoregressive" if m.objective == "next" else "Masked"
    history = "\n".join(f"| {name} | {value} |" for name, value in _history(about).items())
    return f"""# ImageGPT, {m.n_layer} layers x {m.n_embd}, {m.n_px}x{m.n_px}, {m.n_vocab} colours

{objective} model of pixels ("Generative Pretraining from Pixels", Chen et al., 2020), written by igpt_ray.

| | |
|---|---|
| parameters | {m.n_params:,} |
| not in the paper | {", ".join(m.modern) or "nothing"} |
{history}
| palette | sha256 {k.palette[:16]} |
| pixel pipeline | {k.pipeline} |
| classes in the data | {len(about.classes)} |

Weights are in `model.safetensors`, settings and versions in `config.json`. The model reproduces what its training
images show, their biases included; it has no notion of what a picture means.
"""


def _history(about: ReleaseConfig) -> dict[str, str]:
    """Where the weights come from."""
    trained, token = about.trained, "token" if about.model.objective == "next" else "masked token"
    if origin := trained.get("converted_from"):
        return {
            "converted from": str(origin),
            "pixel pipeline in training": "not told by the source; the one below was stated at the conversion",
        }
    nats = trained.get("nats_per_token")
    return {
        "steps": str(trained.get("steps")),
        f"training nats per {token}, last line": str(nats if nats is None else f"{nats:.4f}"),
    }
