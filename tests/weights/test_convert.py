"""Conversion: the same weights in every format, with an explicit palette and pipeline."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, random_model

from igpt_ray import weights
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat
from igpt_ray.errors import CheckpointError, PaletteError, SettingError
from igpt_ray.weights.config import ConvertConfig
from igpt_ray.weights.convert import ConvertResult, convert
from tests.weights.test_release import about

OPENAI = Path(__file__).parents[1] / "golden" / "openai_bert_tiny" / "model.ckpt-7"


@pytest.fixture
def release(tmp_path: Path, palette: Palette, kind: TokenFormat) -> str:
    uri, model = str(tmp_path / "release"), random_model()
    weights.save_release(uri, model.state_dict(), palette, about(model, kind))
    return uri


def run(source: str | Path, out: Path, **more: Any) -> ConvertResult:
    return convert(ConvertConfig(source=str(source), out=str(out), **more))


def test_a_round_trip_through_transformers_preserves_weights_and_palette(release: str, tmp_path: Path) -> None:
    """Neither weights nor colours are rounded, although colours pass through JSON."""
    there = run(release, tmp_path / "hf", to="transformers")
    back = run(tmp_path / "hf", tmp_path / "back", pipeline="reference")
    assert (there.format, back.format) == ("release", "transformers")
    assert there.palette == back.palette
    for name in ("model.safetensors", "palette.npy"):
        assert Path(release, name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    assert weights.load_config(str(tmp_path / "back")).kind == weights.load_config(release).kind


def test_a_release_from_openais_checkpoint_records_its_origin(palette: Palette, tmp_path: Path) -> None:
    """The model card must not present converted weights as ours, nor an assumed pipeline as known."""
    palette.save(str(tmp_path / "p.npy"))
    report = run(OPENAI, tmp_path / "r", palette=str(tmp_path / "p.npy"), pipeline="fast", view="direct")
    assert (report.format, report.objective, report.n_layer) == ("openai", "masked", 2)
    loaded = weights.load_release(str(tmp_path / "r"))
    for a, b in zip(loaded.model.parameters(), weights.load_openai(OPENAI).parameters(), strict=True):
        assert (a == b).all()
    assert loaded.config.kind.pipeline == "fast-direct-1"
    card = (tmp_path / "r" / "README.md").read_text()
    assert f"| converted from | {OPENAI} (openai) |" in card
    assert "unknown; the one below was set at the conversion" in card
    assert card.count("Masked model of pixels") == 1
    assert "steps" not in card


def test_missing_or_contradictory_settings_are_errors(release: str, palette: Palette, tmp_path: Path) -> None:
    other, small = str(tmp_path / "other.npy"), str(tmp_path / "small.npy")
    Palette(np.roll(palette.colours, 1, 0)).save(other)
    Palette(palette.colours[:3]).save(small)
    (tmp_path / "empty").mkdir()
    for source, more, error, said in (
        (OPENAI, {}, SettingError, "has no palette, and a release needs one: set --palette openai, or a .npy"),
        (OPENAI, {"palette": "openai"}, SettingError, "the palette has 512 colours, the model a vocabulary of 16"),
        (OPENAI, {"palette": small}, SettingError, "the palette has 3 colours"),
        (OPENAI, {"palette": str(OPENAI) + ".index"}, PaletteError, "is not a palette"),
        (OPENAI, {"to": "transformers"}, CheckpointError, "transformers' ImageGPT has no masked network"),
        (release, {}, SettingError, "is already a release: use --to transformers"),
        (
            release,
            {"to": "transformers", "palette": other},
            SettingError,
            "already has a palette, which differs from",
        ),
        (tmp_path / "empty", {}, CheckpointError, "nothing to convert at"),
        (OPENAI.parent, {}, CheckpointError, "without .index"),
    ):
        with pytest.raises(error, match=said):
            run(source, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_job_prints_its_result_or_its_error_in_one_line(release: str, tmp_path: Path) -> None:
    """The job does not start a Ray cluster."""
    words = [sys.executable, "jobs/convert.py", "--source", release, "--out", str(tmp_path / "hf")]
    done = subprocess.run([*words, "--to", "transformers"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["out"] == str(tmp_path / "hf")
    refused = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.strip() == f"error: {release} is already a release: use --to transformers to convert it"
