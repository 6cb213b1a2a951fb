"""The metrics of a run contain every step once, after any number of kills and resumes."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from igpt_ray import storage
from igpt_ray.errors import StorageError
from igpt_ray.train import metrics
from igpt_ray.train.metrics import Metrics


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "nats_per_token": 6.0 - step / 100, **more}


def test_a_new_run_has_no_metrics(on_moto: str) -> None:
    """A missing file is not an error."""
    assert metrics.read(on_moto) == []
    assert Metrics(on_moto, 0).lines == []


def test_lines_survive_a_flush(place: str) -> None:
    """One JSON object per line, with exact numbers."""
    stream = Metrics(place, 0)
    for step in (10, 20):
        stream.add(line(step, lr=0.1 + 0.2, note="é\n"))
    assert metrics.read(place) == []
    stream.flush()
    assert metrics.read(place) == [line(10, lr=0.1 + 0.2, note="é\n"), line(20, lr=0.1 + 0.2, note="é\n")]
    text = storage.read(storage.join(place, "metrics", "000000.jsonl")).decode()
    assert [json.loads(t)["step"] for t in text.splitlines()] == [10, 20]
    assert text.endswith("\n")


@pytest.mark.parametrize("resumed_at", [0, 15, 20, 30, 99])
def test_a_resumed_run_continues_without_gaps_or_duplicates(tmp_path: Any, resumed_at: int) -> None:
    """Lines of steps that are trained again are replaced."""
    run = str(tmp_path)
    stream = Metrics(run, 0)
    for step in (10, 20, 30):
        stream.add(line(step, attempt=1))
    stream.flush()
    resumed = Metrics(run, resumed_at)
    for step in (10, 20, 30, 40):
        if step > resumed_at:
            resumed.add(line(step, attempt=2))
    resumed.flush()
    found = metrics.read(run)
    assert [x["step"] for x in found] == [
        step for step in (10, 20, 30, 40) if step <= min(resumed_at, 30) or step > resumed_at
    ]
    assert [x["attempt"] for x in found] == [1 if x["step"] <= resumed_at else 2 for x in found]


def test_a_second_flush_does_not_repeat_the_first(tmp_path: Any) -> None:
    """It appends only new lines."""
    stream = Metrics(str(tmp_path), 0)
    stream.add(line(1))
    stream.flush()
    stream.flush()
    stream.add(line(2))
    stream.flush()
    assert [x["step"] for x in metrics.read(str(tmp_path))] == [1, 2]


@pytest.mark.parametrize("resumed_at", [0, 2, 3, 4, 9, 10])
def test_parts_are_written_once_and_later_ones_are_dropped_by_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed_at: int
) -> None:
    """The bytes of a flush do not grow with the run."""
    monkeypatch.setattr(metrics, "PART", 3)
    written: list[str] = []
    write = storage.write
    monkeypatch.setattr(storage, "write", lambda uri, data: (written.append(storage.name(uri)), write(uri, data)))
    stream = Metrics(str(tmp_path), 0)
    for step in range(1, 11):
        stream.add(line(step))
        stream.flush()
    assert written == [f"{i // 3:06d}.jsonl" for i in range(10)]
    resumed = Metrics(str(tmp_path), resumed_at)
    resumed.flush()
    assert [x["step"] for x in metrics.read(str(tmp_path))] == list(range(1, resumed_at + 1))
    for step in range(resumed_at + 1, 15):
        resumed.add(line(step))
    resumed.flush()
    assert [x["step"] for x in metrics.read(str(tmp_path))] == list(range(1, 15))


def test_lines_of_a_failed_flush_are_stored_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PART", 2)
    stream = Metrics(str(tmp_path), 0)
    for step in range(1, 6):
        stream.add(line(step))
    with monkeypatch.context() as failing:
        failing.setattr(storage, "write", Mock(side_effect=StorageError("no space")))
        with pytest.raises(StorageError):
            stream.flush()
    stream.flush()
    assert [x["step"] for x in metrics.read(str(tmp_path))] == [1, 2, 3, 4, 5]


def test_a_run_with_one_file_is_read_and_continued_in_parts(tmp_path: Path) -> None:
    storage.write(storage.join(str(tmp_path), "metrics.jsonl"), b'{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    stream = Metrics(str(tmp_path), 2)
    stream.add(line(3))
    stream.flush()
    assert [x["step"] for x in metrics.read(str(tmp_path))] == [1, 2, 3]
    assert metrics.read(str(tmp_path))[2] == line(3)
