"""The GPU benchmark at toy size on a CPU: every part runs, and the report shows what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "where": ("copy_gb_per_s", "product_tflops"),
    "attention": ("igpt-s default", "igpt-s one query"),
    "train": ("igpt-l eager", "profile eager"),
    "sample": ("igpt-s 1 bfloat16", "transformers igpt-s 1", "igpt-s 1 int8"),
    "checkpoint": ("igpt-m",),
    "palette": ("faiss", "cpu"),
    "tests": ("pytest",),
}
"""Parts, and measurements that each must have. Compiled training is left out: it needs a minute on a CPU."""


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_all_parts_run_at_toy_size_and_are_reported(tmp_path: Path) -> None:
    only = [name for names in PARTS.values() for name in names]
    run(*PARTS, "--toy", "--out", str(tmp_path), "--seconds", "500", "--only", *only)
    text = run("report", "--out", str(tmp_path))
    for part, names in PARTS.items():
        report = json.loads((tmp_path / f"{part}.json").read_text())
        for name in names:
            value = report[name] if isinstance(report[name], dict) else {}
            assert "error" not in value, (part, name, value)
            assert value.get("skipped") != "no time left", (part, name)
            assert name in text, (part, name)
        assert f"### {part}" in text


def test_a_measurement_that_fails_is_reported_and_does_not_end_the_part(tmp_path: Path) -> None:
    from benchmarks.gpu import Part

    part = Part("sample", tmp_path, seconds=60, toy=True, only=[])

    def fails() -> None:
        raise RuntimeError("out of memory")

    part.measure("first", fails)
    part.measure("second", lambda: {"pixels_per_s": 1})
    report = json.loads((tmp_path / "sample.json").read_text())
    assert report["first"]["error"] == "RuntimeError: out of memory"
    assert report["second"] == {"pixels_per_s": 1}


def test_a_part_without_time_left_skips_what_remains(tmp_path: Path) -> None:
    from benchmarks.gpu import Part

    part = Part("sample", tmp_path, seconds=-1, toy=True, only=[])
    part.measure("late", lambda: pytest.fail("it must not run"))
    assert json.loads((tmp_path / "sample.json").read_text())["late"] == {"skipped": "no time left"}
