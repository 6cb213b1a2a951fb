"""Releases: a bit-exact round trip; damaged, foreign or malicious files are errors."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Bomb, random_model, random_tokens
from safetensors.torch import load_file, save
from torch import Tensor

from igpt_ray import storage, weights
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat
from igpt_ray.errors import CheckpointError, NotFound, PaletteError
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.weights import ReleaseConfig


def about(model: ImageGPT, kind: TokenFormat) -> ReleaseConfig:
    return ReleaseConfig(
        format=weights.FORMAT,
        model=model.config,
        kind=kind,
        sha256="",
        classes=["cat", "dog"],
        trained={"steps": 7, "nats_per_token": 1.25},
    )


@pytest.fixture
def release(tmp_path: Path, palette: Palette, kind: TokenFormat) -> str:
    """URI of a small release with random weights."""
    uri, model = str(tmp_path / "release"), random_model()
    weights.save_release(uri, model.state_dict(), palette, about(model, kind))
    return uri


def replace(uri: str, data: bytes) -> None:
    """Replace the weights and their hash, as the author of a malicious release could."""
    Path(uri, "model.safetensors").write_bytes(data)
    described = json.loads(Path(uri, "config.json").read_text())
    described["sha256"] = hashlib.sha256(data).hexdigest()
    Path(uri, "config.json").write_text(json.dumps(described))


def tensors(uri: str) -> dict[str, Tensor]:
    return load_file(Path(uri, "model.safetensors"))


def refusal(uri: str, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        weights.load_release(uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ what is good


@pytest.mark.parametrize("modern", [False, True])
def test_a_release_loads_as_the_saved_model(modern: bool, place: str, palette: Palette, kind: TokenFormat) -> None:
    """All tensors are equal, and the model is in evaluation mode."""
    model = random_model(qk_norm=modern, rotary=modern)
    weights.save_release(place, model.state_dict(), palette, about(model, kind))
    loaded = weights.load_release(place)
    x = random_tokens(model, 3)
    assert torch.equal(loaded.model(x), model(x))
    assert not loaded.model.training
    assert loaded.palette.fingerprint == palette.fingerprint
    assert loaded.config == weights.load_config(place)
    assert loaded.config.model_dump(exclude={"sha256"}) == about(model, kind).model_dump(exclude={"sha256"})


def test_the_weights_are_plain_float32_safetensors(tmp_path: Path, palette: Palette, kind: TokenFormat) -> None:
    """Any reader of safetensors can load them; strided and bfloat16 tensors are converted."""
    model = random_model()
    odd = {name: t.bfloat16().t() if t.ndim == 2 else t for name, t in model.state_dict().items()}
    odd = {name: t.t() if t.ndim == 2 else t for name, t in odd.items()}
    weights.save_release(str(tmp_path), odd, palette, about(model, kind))
    stored = tensors(str(tmp_path))
    assert stored.keys() == model.state_dict().keys()
    assert {t.dtype for t in stored.values()} == {torch.float32}
    assert torch.equal(stored["wte.weight"], model.wte.weight.bfloat16().float())


def test_the_model_card_describes_the_model(release: str, palette: Palette) -> None:
    """It has size, training and palette."""
    card = Path(release, "README.md").read_text()
    for said in (f"{random_model().config.n_params:,}", "| steps | 7 |", "1.2500", palette.fingerprint[:16]):
        assert said in card


def test_tokens_of_another_format_are_an_error(release: str, kind: TokenFormat) -> None:
    """Another palette or pixel pipeline would give wrong results without an error."""
    described = weights.load_config(release)
    weights.check_kind(described.kind, kind, "the store")
    for change in ({"n_px": 8}, {"n_vocab": 512}, {"palette": "0" * 64}, {"pipeline": "fast-1"}):
        (field,) = change
        with pytest.raises(CheckpointError, match=rf"trained with {field} .*the store has {change[field]}"):
            weights.check_kind(described.kind, kind.model_copy(update=change), "the store")
    with pytest.raises(CheckpointError, match=r"set --pixels\.pipeline reference --pixels\.view imagenet"):
        weights.check_kind(described.kind, kind.model_copy(update={"pipeline": "reference-direct-1"}), "the store")


# ------------------------------------------------------------------------------------------------ what is damaged


def test_a_flipped_byte_is_detected(release: str) -> None:
    """One exponent bit can turn a weight into 1e38."""
    path = Path(release, "model.safetensors")
    data = path.read_bytes()
    for position in range(0, len(data), len(data) // 40):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        assert "model.safetensors is damaged" in refusal(release)
    path.write_bytes(data[:-1])
    assert "model.safetensors is damaged" in refusal(release)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda t: {key: value for key, value in t.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("sos"), "lacks sos"),
        (without("h.1.mlp.c_fc.weight"), "lacks h.1.mlp.c_fc.weight"),
        (lambda t: t | {"h.3.ln_1.weight": torch.ones(32)}, "does not have: h.3.ln_1.weight"),
        (lambda t: t | {"wtet.bias": torch.zeros(16)}, "does not have: wtet.bias"),
        (lambda t: t | {"wpe": torch.zeros(64, 32)}, "wpe is (64, 32), expected (16, 32)"),
        (lambda t: t | {"wte.weight": torch.zeros(32, 16)}, "wte.weight is (32, 16), expected (16, 32)"),
        (lambda t: t | {"sos": torch.zeros(1, 32)}, "sos is (1, 32), expected (32,)"),
        (lambda t: t | {"sos": torch.full((32,), torch.nan)}, "sos has values that are not finite"),
        (lambda t: t | {"sos": torch.full((32,), -torch.inf)}, "sos has values that are not finite"),
    ],
    ids=["no sos", "no c_fc", "another layer", "a bias", "longer", "transposed", "extra axis", "NaN", "infinite"],
)
def test_weights_of_another_network_are_an_error(
    release: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
) -> None:
    """Weights that are not loaded would stay random."""
    replace(release, save(change(tensors(release))))
    assert said in refusal(release)


def test_a_pickle_is_an_error_and_is_not_opened(release: str, tmp_path: Path) -> None:
    """A downloaded model must not run its author's code, whatever its file name is."""
    trace, torch_file = tmp_path / "ran", tmp_path / "weights.pt"
    torch.save({"sos": Bomb(trace)}, torch_file)
    for data in (torch_file.read_bytes(), pickle.dumps(Bomb(trace)), pickle.dumps(Bomb(trace), protocol=0)):
        replace(release, data)
        assert "not a safetensors file" in refusal(release)
    assert not trace.exists()
    pickle.loads(data)
    assert trace.exists()  # the bomb was live


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 64, (10**15).to_bytes(8, "little") + b"{}"])
def test_an_invalid_safetensors_file_is_an_error(release: str, data: bytes) -> None:
    """An empty file cannot be mapped, and a header may declare a petabyte."""
    replace(release, data)
    assert "not a safetensors file" in refusal(release)


# ------------------------------------------------------------------------------------------------ other files


def change_config(uri: str, change: Callable[[dict[str, Any]], object]) -> None:
    described = json.loads(Path(uri, "config.json").read_text())
    change(described)
    Path(uri, "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format="igpt_ray release 2"), "this version reads 'igpt_ray release 1'"),
        (lambda c: c.update(surprise=1), "not a release of this version"),
        (lambda c: c.pop("kind"), "not a release of this version"),
        (lambda c: c["model"].update(n_head=5), "not a release of this version"),
        (lambda c: c["model"].update(n_layer=2), "does not have: h.2."),
        (lambda c: c["model"].update(n_embd=64), "expected (192, 64)"),
        (lambda c: c["kind"].update(palette="0" * 64), "palette.npy is not the palette"),
        (lambda c: c["kind"].update(n_px=8), "n_px"),
        (lambda c: c["kind"].update(n_vocab=64), "n_vocab"),
    ],
)
def test_an_invalid_config_is_an_error(release: str, change: Callable[[dict[str, Any]], object], said: str) -> None:
    """Missing fields have no defaults, and positions and colours must match the tokens."""
    change_config(release, change)
    assert said in refusal(release)


def test_the_error_for_another_folder_describes_a_release(tmp_path: Path, release: str) -> None:
    """Users may misspell the URI, or give the folder of the run."""
    assert "expected the release/ folder of a run" in refusal(str(tmp_path))
    Path(release, "config.json").write_text("{")
    assert "config.json is not a release of this version" in refusal(release)


def test_a_partially_written_release_is_an_error(tmp_path: Path, palette: Palette, kind: TokenFormat) -> None:
    """The config is written last."""
    model = random_model()
    in_the_way = tmp_path / "config.json"
    in_the_way.mkdir()
    with pytest.raises(storage.StorageError):
        weights.save_release(str(tmp_path), model.state_dict(), palette, about(model, kind))
    in_the_way.rmdir()
    assert (tmp_path / "model.safetensors").exists()
    assert "no release" in refusal(str(tmp_path))


def test_the_error_names_missing_files(release: str, palette: Palette) -> None:
    """Instead of a `FileNotFoundError` with a temporary path."""
    Path(release, "palette.npy").unlink()
    assert "palette.npy does not exist" in refusal(release, NotFound)
    Path(release, "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(release)


def test_another_palette_next_to_the_weights_is_an_error(release: str, palette: Palette) -> None:
    """Every sample would have false colours."""
    Palette(np.roll(palette.colours, 1, 0)).save(storage.join(release, "palette.npy"))
    assert "palette.npy is not the palette" in refusal(release)
    storage.write(storage.join(release, "palette.npy"), b"not a palette")
    assert "is not a palette" in refusal(release, PaletteError)
