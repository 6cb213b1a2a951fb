"""The report and the audit on a cluster, from a release of random weights on coloured digits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from igpt_ray import storage, weights
from igpt_ray.errors import FeatureError, SettingError
from igpt_ray.evaluate import bias, features, ieat
from igpt_ray.evaluate.config import AuditConfig, ProbeConfig
from igpt_ray.flows.audit import run_audit
from igpt_ray.flows.config import ReportConfig
from igpt_ray.flows.probe import probe_layers
from igpt_ray.flows.report import write_report

pytestmark = pytest.mark.ray


@pytest.fixture
def both(prepared: str, released: str) -> dict[str, Any]:
    return {"release": released, "tokens": storage.join(prepared, "tokens")}


@pytest.mark.slow
def test_the_report_computes_only_missing_parts(both: dict[str, Any], tmp_path: Path) -> None:
    """The page has the figures of its parts; a part that is missing, damaged or of other settings is recomputed."""
    settings = ReportConfig(**both, out=str(tmp_path), images=2, n=2, low_data=(2, 400))
    report = write_report(settings)
    assert report["made"] == ["likelihood", "completions", "probe"]
    page = (tmp_path / "report.html").read_text()
    figures = json.loads((tmp_path / "report.json").read_text())
    likelihood = json.loads((tmp_path / "likelihood/likelihood.json").read_text())
    assert figures["likelihood"] == likelihood
    assert f"{likelihood['nats_per_token']:.4f}" in page
    assert f"{figures['probe']['raw_pixels']['accuracy']:.1%}" in page
    assert list(figures["probe"]["low_data"]) == ["2"]
    assert "400 labels a class: the smallest class has fewer" in page
    assert page.count("<figure>") == 12 + 12 + 2  # either end of the ranking, completions, palette
    assert f"{figures['probe']['accuracy']:.1%}" in (tmp_path / "row.md").read_text()

    (tmp_path / "completions/completions.png").unlink()
    (tmp_path / "likelihood/part.json").write_text("{")
    assert write_report(settings)["made"] == ["likelihood", "completions"]
    assert (tmp_path / "report.html").read_text() == page
    assert write_report(settings.model_copy(update={"n": 3}))["made"] == ["completions"]


def test_incompatible_settings_are_refused_before_any_part_runs(both: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="the split test is in --fit-split and in --split"):
        write_report(ReportConfig(**both, out=str(tmp_path), fit_split="test"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_audit_s_figures_equal_a_direct_computation(
    both: dict[str, Any], digit_images: str, tmp_path: Path
) -> None:
    """Sets are not swapped, layers are not off by one, completions count for their own group."""
    stimuli = tmp_path / "stimuli"
    for folder, digit, n in (("X", 0, 3), ("Y", 1, 3), ("A", 2, 2), ("B", 3, 4), ("faces/a", 4, 2), ("faces/b", 5, 3)):
        for entry in list(storage.walk(f"{digit_images}/train/{digit}"))[:n]:
            storage.write(f"{stimuli}/{folder}/{storage.name(entry.uri)}", storage.read(entry.uri))
    probe = str(tmp_path / "probe")
    probe_layers(ProbeConfig(**both, out=probe, layers=(1,)))
    named = {"digits": {letter: letter for letter in "XYAB"}}
    storage.write(f"{stimuli}/tests.json", json.dumps(named).encode())
    settings = AuditConfig(
        release=both["release"],
        out=str(tmp_path / "audit"),
        ieat=f"{stimuli}/tests.json",
        layers=(0, 2),
        groups=f"{stimuli}/faces",
        classifier=probe,
        n=3,
        batch_size=4,
    )
    report = run_audit(settings).line()

    release = weights.load_release(both["release"])
    (test,) = bias.load_tests(settings.ieat)
    rows = {}
    for letter, uris in test.sets.items():
        tokens = np.stack([bias.read_tokens(uri, release.config.kind, release.palette) for uri in uris])
        rows[letter] = features.pooled(release.model, tokens, uris, [0, 2], "mean", 8)
    for i, found in enumerate(report["ieat"]):
        expected = ieat.association_test(*(rows[letter][:, i] for letter in "XYAB"))
        assert found["effect_size"] == pytest.approx(expected.effect_size, abs=1e-4)
        assert found["p_value"] == expected.p_value
        assert found["exact"]
    assert [found["layer"] for found in report["ieat"]] == [0, 2]
    every = [*report["ieat"], report["completions"]]
    assert [one["p_holm"] for one in every] == bias.holm([one["p_value"] for one in every])

    table = pq.read_table(tmp_path / "audit/completions.parquet").to_pydict()
    assert table["group"] == ["a", "a", "b", "b", "b"]
    evaluate_classifier = bias.load_classifier(probe, release.config.kind, "cpu", 8)
    for group, found in report["completions"]["groups"].items():
        tokens = [t for g, t in zip(table["group"], table["completions"], strict=True) if g == group]
        chosen = evaluate_classifier.select(np.array(tokens, np.uint16).reshape(-1, 64), [""] * 3 * len(tokens))
        counts = np.bincount(chosen, minlength=10)
        assert found["counts"] == dict(zip(map(str, range(10)), counts.tolist(), strict=True))
        assert (found["pictures"], found["completions"]) == (len(tokens), 3 * len(tokens))

    first = json.loads((tmp_path / "audit/audit.json").read_text())
    assert run_audit(settings).line()["completions"] == first["completions"]


def test_an_audit_without_inputs_is_refused(both: dict[str, Any], tmp_path: Path) -> None:
    inputs = {"release": both["release"], "out": str(tmp_path)}
    with pytest.raises(SettingError, match="nothing to audit: set --ieat"):
        run_audit(AuditConfig(**inputs))
    with pytest.raises(SettingError, match="--groups and --classifier go together"):
        run_audit(AuditConfig(**inputs, groups=str(tmp_path)))
    with pytest.raises(SettingError, match="there is no layer 9"):
        run_audit(AuditConfig(**inputs, ieat=_stimuli(tmp_path), layers=(9,)))
    with pytest.raises(FeatureError, match="nothing to test"):  # all pictures are the same
        run_audit(AuditConfig(**inputs, ieat=_stimuli(tmp_path)))


def _stimuli(folder: Path) -> str:
    from igpt_ray.data import pixels

    for letter in "XYAB":
        storage.write(f"{folder}/same/{letter}/0.png", pixels.png(np.zeros((8, 8, 3), np.uint8)))
    return f"{folder}/same"
