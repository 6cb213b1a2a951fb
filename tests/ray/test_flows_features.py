"""Features and probes on a cluster, against the same asked directly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pytest

from igpt_ray import storage, weights
from igpt_ray.data.token_store import TokenStore, tokens_of
from igpt_ray.errors import FeatureError, SettingError
from igpt_ray.evaluate import features
from igpt_ray.evaluate.config import FeaturesConfig, ProbeConfig, SgdConfig
from igpt_ray.evaluate.features import FeatureStore
from igpt_ray.evaluate.linear_probe import Choice, Labelled, Method, evaluate_classifier, refit, select
from igpt_ray.evaluate.logistic import Linear
from igpt_ray.flows.features import extract
from igpt_ray.flows.probe import probe_layers, raw_pixels

pytestmark = pytest.mark.ray


@pytest.fixture
def both(prepared: str, released: str) -> dict[str, Any]:
    return {"release": released, "tokens": storage.join(prepared, "tokens")}


def test_features_from_a_cluster_equal_a_direct_computation(both: dict[str, Any], tmp_path: Path) -> None:
    """Units in the order in which actors happened to end."""
    settings = FeaturesConfig(**both, out=str(tmp_path), precision="float32", batch_size=7)
    report = extract(settings)
    assert report.units_made == report.units == 4
    tokens = np.concatenate([tokens_of(table) for table in TokenStore.open(both["tokens"]).read_split("train")])
    model = weights.load_release(both["release"]).model
    direct = features.pooled(model, tokens, [""] * len(tokens), [0, 1, 2], "mean", 64)
    for layer in range(3):
        np.testing.assert_allclose(FeatureStore(str(tmp_path)).layer("train", layer)[0], direct[:, layer], atol=1e-5)
    assert extract(settings).units_made == 0


def test_the_probe_reports_the_best_layer_and_both_baselines(both: dict[str, Any], tmp_path: Path) -> None:
    """A layer chosen by the test split, a baseline of other images, a figure that the files do not bear out."""
    settings = ProbeConfig(**both, out=str(tmp_path), baselines=True, concatenate=2, low_data=(2, 4), seed=3)
    report = probe_layers(settings).line()
    assert [tried["layer"] for tried in report["layers"]] == [0, 1, 2]
    best = report["best_layer"]
    assert report["validation"] == max(tried["validation"] for tried in report["layers"])
    assert all("accuracy" not in tried for tried in report["layers"])  # the test split is looked at once

    kept = FeatureStore(str(tmp_path / "features"))
    fit, test = (Labelled(*kept.layer(split, best)) for split in ("train", "test"))
    choice = select(fit, 10, 3, Method())
    assert choice == Choice(report["validation"], report["setting"])
    sums = evaluate_classifier(refit(fit, 10, choice.setting, Method()), test, np.arange(len(test)), 10)
    expected, confusion = sums.report(), sums.confusion
    assert {name: report[name] for name in expected} == pytest.approx(expected)

    written = pyarrow.csv.read_csv(tmp_path / "confusion.csv")
    assert np.array_equal(np.stack([written[name].to_numpy() for name in written.column_names[1:]], 1), confusion)
    with np.load(tmp_path / "classifier.npz") as parts:
        linear = Linear(parts["mean"], parts["deviation"], parts["weight"], parts["bias"])
        assert parts["layer"] == best
    assert evaluate_classifier(linear, test, np.arange(len(test)), 10).report() == pytest.approx(expected)

    store = TokenStore.open(both["tokens"])
    pixels = [raw_pixels(store, split) for split in ("train", "test")]
    picked = select(pixels[0], 10, 3, Method())
    linear = refit(pixels[0], 10, picked.setting, Method())
    by_pixels = evaluate_classifier(linear, pixels[1], np.arange(len(pixels[1])), 10)
    assert report["raw_pixels"]["accuracy"] == by_pixels.accuracy
    assert report["raw_pixels"]["accuracy"] > 0.5
    assert len(report["untrained"]["layers"]) == 3
    for source in (report, report["untrained"], report["raw_pixels"]):
        assert set(source["low_data"]) == {"2", "4"}
        assert len(source["low_data"]["4"]["linear"]["runs"]) == 5
    assert report["concatenated"]["layers"] in ([0, 1], [1, 2])
    assert best in report["concatenated"]["layers"]
    protocol = json.loads((tmp_path / "probe.json").read_text())["protocol"]
    assert (protocol["fit_images"], protocol["held_out_images"], protocol["test_images"]) == (120, 24, 40)


@pytest.mark.slow
def test_sgd_on_streamed_features_is_close_to_l_bfgs(both: dict[str, Any], tmp_path: Path) -> None:
    """The memory map filled in another order than the labels."""
    by_lbfgs = probe_layers(ProbeConfig(**both, out=str(tmp_path), layers=(1,)))
    by_sgd = probe_layers(
        ProbeConfig(**both, out=str(tmp_path), layers=(1,), method="sgd", sgd=SgdConfig(steps=2000, lrs=(1, 0.1, 0.01)))
    )
    assert by_sgd.validation >= by_lbfgs.validation - 0.1  # 24 images


def test_invalid_probes_are_refused_before_features_are_computed(both: dict[str, Any], tmp_path: Path) -> None:
    """Labels that are missing, or too few; a layer that is not there; features of something else."""
    with pytest.raises(SettingError, match="the split train is in --fit-split and in --split"):
        probe_layers(ProbeConfig(**both, out=str(tmp_path), split="train"))
    with pytest.raises(SettingError, match="there is no layer 3: this network has layers 0 to 2"):
        probe_layers(ProbeConfig(**both, out=str(tmp_path), layers=(3,)))
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        FeatureError, match=r"the class '\d' has \d+ images to fit on, fewer than the 400 of --low-data"
    ):
        probe_layers(ProbeConfig(**both, out=str(tmp_path), low_data=(400,)))
    assert not list(tmp_path.iterdir())
    extract(FeaturesConfig(**both, out=str(tmp_path / "features"), splits=("test",)))
    with pytest.raises(FeatureError, match="has features of another specification: pooling mean, not max"):
        probe_layers(ProbeConfig(**both, out=str(tmp_path), pooling="max"))
