"""What a release says about a split, on a cluster, against the same asked directly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from igpt_ray import storage, weights
from igpt_ray.data.config import PixelsConfig, PrepareConfig
from igpt_ray.data.token_store import TokenStore, tokens_of
from igpt_ray.errors import CheckpointError, SettingError, TokenStoreError
from igpt_ray.evaluate.config import EvaluateConfig, ScoreConfig
from igpt_ray.evaluate.likelihood import image_nats
from igpt_ray.flows import batch, evaluate, prepare
from igpt_ray.generate import completion
from igpt_ray.generate.config import CompleteConfig

pytestmark = pytest.mark.ray


@pytest.fixture
def both(prepared: str, released: str) -> dict[str, Any]:
    return {"release": released, "tokens": storage.join(prepared, "tokens")}


def tokens_in_order(both: dict[str, Any], split: str) -> np.ndarray:
    return np.concatenate([tokens_of(table) for table in TokenStore.open(both["tokens"]).read_split(split)])


def test_evaluation_equals_a_direct_computation(both: dict[str, Any]) -> None:
    """Catches shards left out, counted twice, or averaged by shard instead of by token."""
    nats = image_nats(weights.load_release(both["release"]).model, tokens_in_order(both, "train"), 7)
    report = evaluate.evaluate(EvaluateConfig(**both, split="train", baselines="test")).line()
    assert report["nats_per_token"] == pytest.approx(nats.mean() / 64, rel=1e-6)
    assert report["tokens"] == nats.size * 64
    assert 0 < report["baselines"]["context_2d"] < report["baselines"]["unigram_by_position"]


def test_the_likelihood_report_has_positions_classes_and_baselines(both: dict[str, Any], tmp_path: Path) -> None:
    """Parts that do not add up to the whole: shards joined in another order, classes or positions left out."""
    settings = EvaluateConfig(**both, split="test", out=str(tmp_path / "report"), against=both["tokens"])
    report = evaluate.evaluate(settings).line()
    assert report["against"]["auroc"] == 0.5  # the store against itself
    said = json.loads((tmp_path / "report/likelihood.json").read_text())
    assert said["nats_per_token"] == report["nats_per_token"]
    by_position = np.array(said["by_position"])
    assert by_position.shape == (8, 8)
    assert by_position.mean() == pytest.approx(report["nats_per_token"])
    images = {name: found["images"] for name, found in said["by_class"].items()}
    assert sum(images.values()) == report["images"] == 40
    mean = sum(found["nats_per_token"] * found["images"] for found in said["by_class"].values()) / 40
    assert mean == pytest.approx(report["nats_per_token"])
    assert np.asarray(Image.open(tmp_path / "report/surprise.png")).shape == (512, 512, 3)


def test_scores_match_their_images_and_sum_to_the_evaluation(both: dict[str, Any], tmp_path: Path) -> None:
    report = batch.score(ScoreConfig(**both, out=str(tmp_path), split="train"))
    evaluated = evaluate.evaluate(EvaluateConfig(**both, split="train")).line()
    assert report["nats_per_token"] == pytest.approx(evaluated["nats_per_token"], rel=1e-6)
    rows = [row for path in sorted((tmp_path / "train").iterdir()) for row in pq.read_table(path).to_pylist()]
    nats = image_nats(weights.load_release(both["release"]).model, tokens_in_order(both, "train"), 64)
    assert [row["nats"] for row in rows] == pytest.approx(nats, rel=1e-5)
    assert all(row["key"].startswith(f"{row['label']}/") for row in rows)


def test_a_repeated_score_computes_only_missing_damaged_and_outdated_units(
    both: dict[str, Any], released: str, tmp_path: Path
) -> None:
    settings = ScoreConfig(**both, out=str(tmp_path), split="train")
    batch.score(settings)
    kept, damaged, missing = sorted((tmp_path / "train").iterdir())
    whole = [path.read_bytes() for path in (kept, damaged, missing)]
    written = kept.stat().st_mtime_ns
    damaged.write_bytes(whole[1][: len(whole[1]) // 2])
    missing.unlink()
    batch.score(settings)
    assert [path.read_bytes() for path in (kept, damaged, missing)] == whole
    assert kept.stat().st_mtime_ns == written

    other = weights.load_release(released)
    other.model.sos.data.add_(1)
    weights.save_release(str(tmp_path / "other"), other.model.state_dict(), other.palette, other.config)
    batch.score(settings.model_copy(update={"release": str(tmp_path / "other")}))
    assert kept.read_bytes() != whole[0]


def test_completions_keep_the_prompt_and_are_drawn(both: dict[str, Any], prepared: str, tmp_path: Path) -> None:
    settings = CompleteConfig(**both, out=str(tmp_path), images=3, n=2, rows=5)
    report = batch.complete(settings)
    table = pq.read_table(tmp_path / "completions.parquet")
    originals = table["original"].combine_chunks().to_numpy_ndarray()
    completions = table["completions"].combine_chunks().to_numpy_ndarray()
    assert completions.shape == (3, 2, 64)
    assert (completions[:, :, :40] == originals[:, None, :40]).all()
    assert report["sampled_tokens"] == 3 * 2 * 24
    figure = np.asarray(Image.open(tmp_path / "completions.png"))
    palette = TokenStore.open(both["tokens"]).palette()
    scale = completion.TILE // 8
    assert (figure[2, -3] == palette.decode(originals[0, 7])).all()  # the top right corner is the original's
    assert (figure[2 + 6 * scale, 3] == 128).all()  # what is not given is grey

    first = (tmp_path / "completions.png").read_bytes()
    batch.complete(settings)
    assert (tmp_path / "completions.png").read_bytes() == first


def test_a_store_with_another_token_format_and_a_missing_release_are_refused(
    both: dict[str, Any], prepared: str, digit_images: str, tmp_path: Path
) -> None:
    pixels = PixelsConfig(n_px=4, crop="centre")
    palette = storage.join(prepared, "palette.npy")
    other = PrepareConfig(source=digit_images, palette=palette, tokens=str(tmp_path / "tokens"), pixels=pixels)
    prepare.prepare(other)
    with pytest.raises(CheckpointError, match=r"trained with n_px 8, but .* has 4"):
        evaluate.evaluate(EvaluateConfig(release=both["release"], tokens=other.tokens))
    with pytest.raises(CheckpointError, match="no release at"):
        evaluate.evaluate(EvaluateConfig(release=str(tmp_path), tokens=both["tokens"]))
    with pytest.raises(TokenStoreError, match="no split 'dev'"):
        evaluate.evaluate(EvaluateConfig(**both, split="dev"))
    with pytest.raises(SettingError, match="--rows is 9, expected at most 8"):
        batch.complete(CompleteConfig(**both, out=str(tmp_path), rows=9))
