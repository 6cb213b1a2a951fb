"""Weights & Biases and MLflow get each line of the metrics once, and their failures do not affect a run.

There is no server: W&B writes the file that it would send, and MLflow its folder."""

import json
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import SettingError
from igpt_ray.train import checkpoint, loop, metrics, trackers
from igpt_ray.train.config import PretrainConfig
from tests.train.test_loop import CPU, settings_for, weights_of

Found = dict[int, dict[str, float]]


@pytest.fixture(params=["wandb", "mlflow"])
def track(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return str(request.param)


def tracked(track: str, folder: Path) -> Found:
    return {"wandb": in_wandb, "mlflow": in_mlflow}[track](folder)


def in_wandb(folder: Path) -> Found:
    """Metrics by step from the files that `wandb sync` would send, oldest first; the server ignores known steps."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: Found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        for data in records_of(path.read_bytes()[7:]):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                step = record.history.step.num
                found.setdefault(step, {k: v for k, v in items.items() if not k.startswith("_")})
    return found


def records_of(log: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format after its 7 bytes of header: blocks of 32 KiB of fragments, each with checksum,
    length and type (full, first, middle or last)."""
    at, record = 7, b""
    while at + 7 <= len(log) + 7:
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, piece = struct.unpack_from("<HB", log, at - 7 + 4)
        record += log[at : at + length]
        at += 7 + length
        if piece in (1, 4):
            yield record
            record = b""


def in_mlflow(folder: Path) -> Found:
    from mlflow import MlflowClient

    client, found = MlflowClient(), Found()
    experiment = client.get_experiment_by_name(trackers.PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            assert name not in found.setdefault(metric.step, {})
            found[metric.step][name] = metric.value
    return found


def test_a_tracker_has_every_line_once_after_resumes(
    process_group: None, store: TokenStore, tmp_path: Path, track: str
) -> None:
    """A resume continues the same run of the tracker, without duplicate steps, and with the settings."""
    cfg = settings_for(store, tmp_path, run={"track": track})
    loop.train(cfg, CPU)
    first = {line["step"]: line for line in metrics.read(cfg.run.uri)}
    checkpoint.rewind(cfg.run.uri, 4)
    loop.train(cfg, CPU)
    found = tracked(track, tmp_path)
    assert sorted(found) == [2, 4, 6, 8, 10, 12]
    for step, line in first.items():
        expected = {name: value for name, value in line.items() if name != "step"}
        assert {name: found[step][name] for name in expected if name != "time"} == {
            name: pytest.approx(value) for name, value in expected.items() if name != "time"
        }
    if track == "mlflow":
        from mlflow import MlflowClient

        experiment = MlflowClient().get_experiment_by_name(trackers.PROJECT)
        (run,) = MlflowClient().search_runs([experiment.experiment_id])
        assert run.data.params["optim.batch_size"] == "5"
        assert run.info.status == "FINISHED"


def test_a_tracker_that_fails_costs_a_warning(
    process_group: None, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    plain = loop.train(settings_for(store, tmp_path, "plain"), CPU)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port, without a server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, "igpt_ray.train.trackers"):
        report = loop.train(settings_for(store, tmp_path, run={"track": "mlflow"}), CPU)
    assert [r.message[:40] for r in caplog.records if r.name == "igpt_ray.train.trackers"] == [
        "the tracker failed and is disabled, trai"
    ]
    assert weights_of(report["run"]) == weights_of(plain["run"])


def test_a_tracker_that_is_not_installed_is_named(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"extra \[track\]"):
        trackers.tracker_of(settings_for(store, tmp_path, run={"track": "wandb"}))
    assert trackers.tracker_of(settings_for(store, tmp_path)) is None


def test_runs_of_one_name_in_two_folders_are_different_runs(store: TokenStore, tmp_path: Path) -> None:
    here, there = (settings_for(store, tmp_path / place) for place in ("a", "b"))
    assert trackers.identity(here) != trackers.identity(there)
    assert trackers.identity(here) == trackers.identity(PretrainConfig.model_validate(here.model_dump()))


def test_the_profiler_writes_a_trace_and_a_table_of_three_steps(
    process_group: None, store: TokenStore, tmp_path: Path
) -> None:
    """The profiler stops after them and does not change the run."""
    plain = loop.train(settings_for(store, tmp_path, "plain"), CPU)
    for at in (5, STEPS_LEFT):
        report = loop.train(settings_for(store, tmp_path, f"at-{at}", run={"profile_at": at}), CPU)
        folder = Path(report["run"], "profile")
        events = json.loads(folder.joinpath("trace.json").read_text())["traceEvents"]
        adam = [e for e in events if e.get("name") == "Optimizer.step#Adam.step"]
        assert len(adam) == min(3, 12 - at + 1)
        assert "Optimizer.step#Adam.step" in folder.joinpath("table.txt").read_text()
        assert weights_of(report["run"]) == weights_of(plain["run"])
    assert torch.is_grad_enabled()


STEPS_LEFT = 11
"""Two steps before the end."""
