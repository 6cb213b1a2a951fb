"""A run's metrics: one JSON object per line, without gaps or duplicates after any number of restarts.

    <run>/metrics/000000.jsonl, 000001.jsonl, ...     PART lines each, in the order of the steps

Object stores cannot append, so a flush rewrites the last part only. The training loop flushes before it commits a
checkpoint, so the lines up to the step of any checkpoint exist; a resumed run drops the lines after its step. Runs
before version 0.2 have all lines in one file, `<run>/metrics.jsonl`.
"""

import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from igpt_ray import storage
from igpt_ray.errors import SettingError

Line = dict[str, Any]


PART = 1000
"""Lines in a part. A flush writes at most one part and the lines since the flush before."""


class Metrics:
    """The stored lines of a run up to `step`, and new lines. The first flush deletes stored lines after `step`."""

    def __init__(self, run: str, step: int, tensorboard: bool = False):
        self.folder = storage.join(run, "metrics")
        stored = _parts(run)
        self.lines = [line for line in read(run) if line["step"] <= step]
        self.stale = stored[math.ceil(len(self.lines) / PART) :]
        self.n_stored = len(self.lines) // PART * PART if stored else 0
        """Number of lines in complete parts."""
        self.events = Events(run, step) if tensorboard else None

    def add(self, line: Line) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        self.flusher()()

    def flusher(self) -> Callable[[], None]:
        """A function for another thread that stores the current lines. If it fails, the next one stores them too."""
        return partial(self._store, self.n_stored, self.lines[self.n_stored :])

    def _store(self, start: int, lines: list[Line]) -> None:
        for uri in self.stale:
            storage.delete(uri)
        self.stale = []
        for i in range(0, len(lines), PART):
            text = "".join(json.dumps(line) + "\n" for line in lines[i : i + PART])
            storage.write(storage.join(self.folder, f"{(start + i) // PART:06d}.jsonl"), text.encode())
        self.n_stored = max(self.n_stored, (start + len(lines)) // PART * PART)
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
    single = storage.join(run, "metrics.jsonl")
    uris = _parts(run) or ([single] if storage.exists(single) else [])
    return [json.loads(line) for uri in uris for line in storage.read(uri).decode().splitlines()]


def _parts(run: str) -> list[str]:
    return sorted(entry.uri for entry in storage.walk(storage.join(run, "metrics")))
