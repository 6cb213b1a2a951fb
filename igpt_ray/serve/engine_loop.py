"""The engine in a thread, with the rows of each completion as an asynchronous iterator."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from igpt_ray.data.token_format import Tokens
from igpt_ray.generate.engine import Engine, Generation, Request

log = logging.getLogger(__name__)


class EngineMetrics(Protocol):
    """Receiver of the engine's metrics."""

    def observe_first_row(self, seconds: float) -> None:
        """Time from the arrival of a request to its first row."""

    def update(self, engine: Engine, now: bool = False) -> None:
        """Called after every step, and with `now` when no request is left."""


@dataclass
class Subscriber:
    """The coroutine that waits for the rows of a generation."""

    row: int
    """The last row that `wake` was called for."""
    wake: Callable[[], object]


class EngineLoop:
    """Runs the engine in a thread, which sleeps while there are no requests."""

    def __init__(self, engine: Engine, n_px: int, metrics: EngineMetrics):
        self.engine = engine
        self.n_px = n_px
        self.metrics = metrics
        self.failure: Exception | None = None
        """The error that ended the thread."""
        self._work = threading.Event()
        self._subscribers: dict[Generation, Subscriber] = {}
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    async def rows(self, request: Request) -> AsyncIterator[tuple[int, Tokens]]:
        """Yield (row, tokens (samples, n_px)) for every row with free pixels. Closing the iterator cancels the request.

        Raises the error that ended the engine.
        """
        started, n_px = time.perf_counter(), self.n_px
        loop, advanced = asyncio.get_running_loop(), asyncio.Event()
        free_rows = np.flatnonzero(~request.prompt_mask) // n_px
        generation = self.engine.submit(request)
        # Subscribed before the first check of the position, so that no later advance is missed.
        subscriber = Subscriber(generation.position // n_px, lambda: loop.call_soon_threadsafe(advanced.set))
        self._subscribers[generation] = subscriber
        self._work.set()
        row = 0
        try:
            while row < n_px:
                if self.failure is not None:
                    raise self.failure
                finished = generation.position // n_px
                while row < finished:
                    if row in free_rows:
                        if row == free_rows[0]:
                            self.metrics.observe_first_row(time.perf_counter() - started)
                        yield row, generation.tokens[:, row * n_px : (row + 1) * n_px].copy()
                    row += 1
                if row < n_px:
                    await advanced.wait()
                    advanced.clear()
        finally:
            del self._subscribers[generation]
            self.engine.cancel(generation)
            self._work.set()

    def _run(self) -> None:
        try:
            while True:
                self._work.wait()
                self._work.clear()
                while self.engine.waiting or self.engine.slots_in_use:
                    self._step()
                self.metrics.update(self.engine, now=True)
        except Exception as error:
            log.exception("the engine has failed")
            self.failure = error
            for subscriber in tuple(self._subscribers.values()):
                subscriber.wake()

    def _step(self) -> None:
        self.engine.step()
        for generation, subscriber in tuple(self._subscribers.items()):
            row = generation.position // self.n_px
            if row != subscriber.row:
                subscriber.row = row
                with suppress(RuntimeError):  # the event loop of the subscriber is closed
                    subscriber.wake()
        self.metrics.update(self.engine)
