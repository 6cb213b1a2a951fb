"""A run's metrics: one JSON object per line, without gaps or duplicates after any number of restarts.

Object stores cannot append, so each flush rewrites the whole file. The training loop flushes before it commits a
checkpoint, so the lines up to the step of any checkpoint exist; a resumed run drops the lines after its step.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from igpt_ray import storage
from igpt_ray.errors import NotFound, SettingError

Line = dict[str, Any]


class Metrics:
    """The lines of `<run>/metrics.jsonl` up to `step`, and new lines. Later lines of the file are dropped."""

    def __init__(self, run: str, step: int, tensorboard: bool = False):
        self.uri = storage.join(run, "metrics.jsonl")
        self.lines = [line for line in read(run) if line["step"] <= step]
        self.events = Events(run, step) if tensorboard else None

    def add(self, line: Line) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        self.flusher()()

    def flusher(self) -> Callable[[], None]:
        """A function for another thread that stores the current lines."""
        return partial(self._store, self.lines.copy())

    def _store(self, lines: list[Line]) -> None:
        storage.write(self.uri, "".join(json.dumps(line) + "\n" for line in lines).encode())
        if self.events is not None:
            self.events.store(lines)


class Events:
    """Every number of every line after `step`, in a TensorBoard event file of this process, `<run>/tensorboard/*`.

    TensorBoard hides the events after `step` that earlier files of the run contain (`purge_step`). Raises
    `SettingError` if the package tensorboard is not installed.
    """

    def __init__(self, run: str, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SettingError("--run.tensorboard needs the extra [track]: pip install 'igpt_ray[track]'") from error
        self.uri = storage.join(run, "tensorboard")
        self.folder = tempfile.TemporaryDirectory()
        self.writer = SummaryWriter(self.folder.name, purge_step=step + 1)
        self.step = step
        """Step of the last line written."""

    def store(self, lines: list[Line]) -> None:
        for line in lines:
            if line["step"] > self.step:
                self.step = line["step"]
                for name in line.keys() - {"step", "time"}:
                    self.writer.add_scalar(name, line[name], self.step, line.get("time"))
        self.writer.flush()
        for path in Path(self.folder.name).iterdir():
            storage.upload(path, storage.join(self.uri, path.name))


def read(run: str) -> list[Line]:
    """All lines of a run; an empty list if it has none."""
    try:
        text = storage.read(storage.join(run, "metrics.jsonl")).decode()
    except NotFound:
        return []
    return [json.loads(line) for line in text.splitlines()]
