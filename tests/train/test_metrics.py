"""The metrics of a run contain every step once, after any number of kills and resumes."""

import json
from typing import Any

import pytest

from igpt_ray import storage
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
    text = storage.read(storage.join(place, "metrics.jsonl")).decode()
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
