"""A worker for `actor_map` whose process dies during some tasks, and decoders that die or are slow."""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Fatal(NamedTuple):
    split: str
    name: str
    deaths: int
    """Number of processes that die before the task succeeds."""


class Dies:
    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, task: Fatal) -> int:
        """The number of processes that died during the task."""
        died = len(list(Path(self.folder).glob(f"{task.name}-*")))
        if died < task.deaths:
            Path(self.folder, f"{task.name}-{died}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # the signal may take a moment
        return died


def slow_view(data: bytes, folder: str) -> NDArray[np.uint8]:
    """Decodes nothing: names the image, by its last byte, in a file of the folder, and takes a moment."""
    Path(folder, str(data[-1])).touch()
    time.sleep(0.05)
    return np.zeros((1, 1, 3), np.uint8)


def hanging_view(data: bytes) -> NDArray[np.uint8]:
    time.sleep(3600)
    return np.zeros(len(data), np.uint8)


_calls: list[int] = []


def lives_for(n: int) -> NDArray[np.int64]:
    """The process id, n times per process; then the process dies."""
    if len(_calls) == n:
        os.kill(os.getpid(), signal.SIGSEGV)
    _calls.append(n)
    return np.array(os.getpid())
