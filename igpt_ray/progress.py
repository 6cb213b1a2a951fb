"""Progress of long tasks on stderr: one bar in a terminal, plain lines at an interval elsewhere."""

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

INTERVAL_S = 10.0
"""Least time between two lines where stderr is no terminal."""


class Progress:
    """Counts the finished units of a task; the rate counts only what this process has finished.

    `total` and `done` are in `unit`s, for example images; `done` is what an earlier run has finished.
    """

    def __init__(self, task: str, total: int, unit: str, done: int = 0):
        self.task, self.total, self.unit = task, total, unit
        self.resumed = self.done = done
        self.started = self.reported = time.monotonic()
        self.bar = tqdm(total=total, initial=done, desc=task, unit=f" {unit}", disable=not sys.stderr.isatty())

    def add(self, n: int, note: str = "", reused: bool = False) -> None:
        """Record `n` more finished units. `note` follows the counts, for example the number of problems.

        `reused` units were finished by an earlier run and do not count towards the rate.
        """
        self.done += n
        self.resumed += n if reused else 0
        if not self.bar.disable:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif self.done >= self.total or time.monotonic() - self.reported >= INTERVAL_S:
            self.reported = time.monotonic()
            log.info("%s", self.line(note))
        if self.done >= self.total:
            self.bar.close()

    def line(self, note: str = "") -> str:
        """For example `prepare: 1,200 of 5,000 images, 300.0 images/s, 0:12 left`."""
        rate = (self.done - self.resumed) / max(time.monotonic() - self.started, 1e-9)
        parts = [f"{self.task}: {self.done:,} of {self.total:,} {self.unit}", f"{rate:,.1f} {self.unit}/s"]
        if self.done < self.total and rate:
            parts.append(f"{tqdm.format_interval((self.total - self.done) / rate)} left")
        return ", ".join([*parts, *filter(None, [note])])


class LogHandler(logging.Handler):
    """Writes log lines to stderr above a progress bar, without breaking it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
