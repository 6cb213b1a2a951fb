"""An actor between the driver of a training run and its workers: requests to stop one way, lines of metrics the other.

The driver creates it on its own node; the workers poll it once a second.
"""

import logging
import math
import sys
import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from igpt_ray.progress import Progress
from igpt_ray.train.metrics import Line

log = logging.getLogger(__name__)

INTERRUPT_TIMEOUT_S = 1.0
"""Seconds in which an interrupted driver expects to learn whether workers will save."""
LOST_S = 10.0
"""Workers that have not polled for so many seconds are not running yet, or no longer."""


class RunStatus:
    """An actor that holds the request to stop, the time of the workers' last poll, and the last line of metrics."""

    def __init__(self) -> None:
        self.stopping = False
        self.polled_at = -math.inf
        self.line: Line | None = None

    def poll(self) -> bool:
        """Called by rank 0: whether to save and stop."""
        self.polled_at = time.monotonic()
        return self.stopping

    def request_stop(self) -> bool:
        """Called by the driver. Returns whether workers poll, i.e. whether a checkpoint can be expected."""
        self.stopping = True
        return time.monotonic() - self.polled_at < LOST_S

    def report(self, line: Line) -> None:
        self.line = line

    def last_line(self) -> Line | None:
        return self.line


def create() -> Any:
    """The actor of a run, on this node."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, scheduling_strategy=node)(RunStatus).remote()


def stop_requested(status: Any) -> bool:
    """Whether the driver requests a stop. False if the actor is lost, because the driver's node is lost with it."""
    try:
        return bool(ray.get(status.poll.remote()))
    except RayError:
        return False


def request_stop(status: Any) -> bool:
    """Ask the workers to save and stop. False if no worker is running, or the actor does not respond."""
    try:
        running = bool(ray.get(status.request_stop.remote(), timeout=INTERRUPT_TIMEOUT_S))
    except RayError:
        return False
    if running:
        log.warning("interrupted: saving a checkpoint; a second interrupt ends the run without it")
    return running


class Bar:
    """The progress bar of a run in the driver's terminal. Elsewhere nothing: the log lines of rank 0 show progress."""

    def __init__(self, task: str, n_steps: int, status: Any):
        self.task, self.n_steps, self.status = task, n_steps, status
        self.shown = sys.stderr.isatty()
        self.progress: Progress | None = None

    def update(self) -> None:
        """Draw the last line of metrics. Called once a second."""
        if not self.shown:
            return
        try:
            line = ray.get(self.status.last_line.remote(), timeout=1)
        except RayError:
            return
        if line is None:
            return
        if self.progress is None:
            self.progress = Progress(self.task, self.n_steps, "steps", line["step"])
        if line["step"] != self.progress.done:
            note = f"{line['nats_per_token']:.4f} nats per token, {line['tokens_per_second']:,.0f} tokens/s"
            self.progress.add(line["step"] - self.progress.done, note)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.bar.close()
