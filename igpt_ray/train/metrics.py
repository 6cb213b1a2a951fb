"""A run's metrics: one JSON object per line, without gaps or duplicates after any number of restarts.

Object stores cannot append, so each flush rewrites the whole file. The training loop flushes before it commits a
checkpoint, so the lines up to the step of any checkpoint exist; a resumed run drops the lines after its step.
TensorBoard's event file is written from the same lines.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from igpt_ray import storage
from igpt_ray.errors import NotFound

Line = dict[str, Any]


class Metrics:
    """The lines of `<run>/metrics.jsonl` up to `step`, to which lines are added. Later lines are dropped."""

    def __init__(self, run: str, step: int, tensorboard: bool = False):
        self.uri = storage.join(run, "metrics.jsonl")
        self.lines = [line for line in read(run) if line["step"] <= step]
        self.events = Events(run) if tensorboard else None

    def add(self, line: Line) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        self.flusher()()

    def flusher(self) -> Callable[[], None]:
        """A function, for another thread, that stores the lines as they are now."""
        return partial(self._store, self.lines.copy())

    def _store(self, lines: list[Line]) -> None:
        storage.write(self.uri, "".join(json.dumps(line) + "\n" for line in lines).encode())
        if self.events is not None:
            self.events.store(lines)


class Events:
    """TensorBoard's event file of a run, `<run>/tensorboard/events.out.tfevents.0`, with every number of every line."""

    def __init__(self, run: str):
        from tensorboardX.proto.event_pb2 import Event  # comes with ray[train]
        from tensorboardX.record_writer import RecordWriter

        self.uri = storage.join(run, "tensorboard", "events.out.tfevents.0")
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "events")
        self.event, self.records = Event, RecordWriter(str(self.path))
        self.records.write(Event(file_version="brain.Event:2").SerializeToString())
        self.written = 0

    def store(self, lines: list[Line]) -> None:
        for line in lines[self.written :]:
            event = self.event(step=line["step"], wall_time=line.get("time", 0))
            for name in line.keys() - {"step", "time"}:
                event.summary.value.add(tag=name, simple_value=line[name])
            self.records.write(event.SerializeToString())
        self.written = len(lines)
        self.records.flush()
        storage.upload(self.path, self.uri)


def read(run: str) -> list[Line]:
    """All lines of a run; an empty list if it has none."""
    try:
        text = storage.read(storage.join(run, "metrics.jsonl")).decode()
    except NotFound:
        return []
    return [json.loads(line) for line in text.splitlines()]
