"""A run's metrics: one JSON object per line, without gaps or doubles whatever was killed and resumed in between.

Object stores cannot append, so the whole (small) file is rewritten at each flush, which the trainer does just before
it commits a checkpoint: whatever step a run resumes from, the lines up to it are there and later ones are dropped.
"""

import json
from typing import Any

from igpt_ray import storage
from igpt_ray.errors import NotFound


class Metrics:
    """The lines of `<run>/metrics.jsonl` up to `step`, to be continued."""

    def __init__(self, run: str, step: int):
        self.uri = storage.join(run, "metrics.jsonl")
        self.lines = [line for line in read(run) if line["step"] <= step]

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        storage.write(self.uri, "".join(json.dumps(line) + "\n" for line in self.lines).encode())


def read(run: str) -> list[dict[str, Any]]:
    """All lines of a run; none if it has written none."""
    try:
        text = storage.read(storage.join(run, "metrics.jsonl")).decode()
    except NotFound:
        return []
    return [json.loads(line) for line in text.splitlines()]
