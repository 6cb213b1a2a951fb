"""A copy of a release, and all that is asked of it: Serve makes as many as are wanted, a test makes one by hand.

Pictures are painted by the engine in a thread of its own, which sleeps while there is nothing to paint and wakes
whoever waits for a row that is finished. Everything else is one forward pass at a time, beside it.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray.util.metrics import Counter, Gauge, Histogram

from igpt_ray import weights
from igpt_ray.data.token_store import Tokens
from igpt_ray.evaluate import features
from igpt_ray.evaluate.features import Features, Pooling
from igpt_ray.evaluate.heads import Head, load_head
from igpt_ray.evaluate.likelihood import Nats, class_logits, pixel_nats
from igpt_ray.evaluate.logistic import probabilities
from igpt_ray.generate.engine import Engine, Generation, Request
from igpt_ray.generate.quantize import Precision

log = logging.getLogger(__name__)

BATCH = 16
"""Images of a forward pass."""
FINE_TUNED = "fine-tuned"
"""What the head of a fine-tuned release is called."""
TOLD_EVERY_S = 0.5
"""Metrics are set so often at most: Ray collects them every few seconds."""


class Replica:
    def __init__(self, name: str, release: str, heads: dict[str, str], slots: int, precision: Precision = "float32"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.about = weights.load_config(release)
        weights.check_next(self.about, release)
        self.model = weights.load_release(release, device).model
        self.heads = {name: load_head(uri) for name, uri in heads.items()}
        self.networks = {"float32": self.model} | {
            head.precision: features.network(release, device, None, head.precision)
            for head in self.heads.values()
            if head.precision != "float32"
        }
        self.turn = asyncio.Lock()
        self.easel = EngineLoop(Engine(self.model, slots, precision), self.about.model.n_px, Gauges(name))

    async def complete(self, request: Request) -> AsyncIterator[tuple[int, Tokens]]:
        """(row, (samples, n_px)) of every row in which something is painted, as soon as all samples have it.

        Whoever stops listening frees the slots.
        """
        rows = self.easel.rows(request)
        try:
            async for row in rows:
                yield row
        finally:
            await rows.aclose()  # type: ignore[attr-defined]

    async def score(self, tokens: Tokens) -> Nats:
        """(N, T) -> (N, T)"""
        return await self._beside(pixel_nats, self.model, tokens, BATCH)

    async def features(self, tokens: Tokens, layer: int, pooling: Pooling) -> Features:
        """(N, T) -> (N, C)"""
        found = await self._beside(features.pooled, self.model, tokens, [], [layer], pooling, BATCH)
        return found[:, 0]

    async def classify(self, tokens: Tokens, head: str) -> Nats:
        """(N, T) -> (N, classes), probabilities."""
        if head == FINE_TUNED:
            return probabilities(await self._beside(class_logits, self.model, tokens, [], BATCH))
        fitted = self.heads[head]
        return await self._beside(fitted.probabilities, self.networks[fitted.precision], tokens, [], BATCH)

    async def ready(self) -> bool:
        """The model has answered: a pixel, from nothing."""
        T = self.about.model.n_positions
        given = np.arange(T) < T - 1
        async for _ in self.complete(Request(np.zeros(T, np.uint16), given, (0,))):
            pass
        return True

    def check_health(self) -> None:
        """Raises what ended the engine: Serve then starts another replica."""
        if self.easel.failure is not None:
            raise self.easel.failure

    async def slots(self) -> tuple[int, int]:
        """In use, and requests waiting for some."""
        return self.easel.engine.slots_in_use, self.easel.engine.waiting

    async def _beside(self, work: Callable[..., Any], *words: Any) -> Any:
        async with self.turn:
            return await asyncio.to_thread(work, *words)


@dataclass
class Waiting:
    """Who waits for the rows of a ticket."""

    row: int
    """The last that they were woken for."""
    wake: Callable[[], object]


class EngineLoop:
    """The engine and the thread it runs in."""

    def __init__(self, engine: Engine, n_px: int, gauges: "Gauges"):
        self.engine = engine
        self.n_px = n_px
        self.gauges = gauges
        self.failure: Exception | None = None
        self._work = threading.Event()
        self._waiting: dict[Generation, Waiting] = {}
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    async def rows(self, request: Request) -> AsyncIterator[tuple[int, Tokens]]:
        started, n_px = time.perf_counter(), self.n_px
        loop, moved = asyncio.get_running_loop(), asyncio.Event()
        to_paint = np.flatnonzero(~request.given) // n_px
        ticket = self.engine.submit(request)
        # Its row is noted before the coroutine looks for the first time: what moves later wakes it.
        self._waiting[ticket] = Waiting(ticket.position // n_px, lambda: loop.call_soon_threadsafe(moved.set))
        self._work.set()
        row = 0
        try:
            while row < n_px:
                if self.failure is not None:
                    raise self.failure
                finished = ticket.position // n_px
                while row < finished:
                    if row in to_paint:
                        if row == to_paint[0]:
                            self.gauges.first_row.observe(time.perf_counter() - started, self.gauges.of)
                        yield row, ticket.tokens[:, row * n_px : (row + 1) * n_px].copy()
                    row += 1
                if row < n_px:
                    await moved.wait()
                    moved.clear()
        finally:
            del self._waiting[ticket]
            self.engine.cancel(ticket)
            self._work.set()

    def _run(self) -> None:
        try:
            while True:
                self._work.wait()
                self._work.clear()
                while self.engine.waiting or self.engine.slots_in_use:
                    self._step()
                self.gauges.tell(self.engine, now=True)
        except Exception as error:
            log.exception("the engine has ended")
            self.failure = error
            for waiting in tuple(self._waiting.values()):
                waiting.wake()

    def _step(self) -> None:
        self.engine.step()
        for ticket, waiting in tuple(self._waiting.items()):
            row = ticket.position // self.n_px
            if row != waiting.row:
                waiting.row = row
                with suppress(RuntimeError):  # its event loop is gone, and so is whoever waited
                    waiting.wake()
        self.gauges.tell(self.engine)


class Gauges:
    """What Prometheus sees of a replica."""

    def __init__(self, name: str):
        tags = ("model",)
        self.of = {"model": name}
        self.slots = Gauge("igpt_slots_in_use", "Pictures being painted.", tags)
        self.waiting = Gauge("igpt_requests_waiting", "Requests that no slot is free for yet.", tags)
        self.pixels = Counter("igpt_pixels_painted", "Pixels painted; its rate is the speed in tokens.", tags)
        self.first_row = Histogram(
            "igpt_first_row_seconds",
            "From a request's arrival at a replica to its first row of pixels.",
            [0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
            tags,
        )
        self._counted, self._told = 0, 0.0

    def tell(self, engine: Engine, now: bool = False) -> None:
        if not now and time.monotonic() < self._told + TOLD_EVERY_S:
            return
        self._told = time.monotonic()
        self.slots.set(engine.slots_in_use, self.of)
        self.waiting.set(engine.waiting, self.of)
        if engine.generated > self._counted:
            self.pixels.inc(engine.generated - self._counted, self.of)
            self._counted = engine.generated


def heads_of(about: weights.ReleaseConfig, heads: dict[str, Head]) -> dict[str, list[str]]:
    """The heads of a release with their classes: its own if it was fine-tuned, and those fitted on its weights."""
    found = {}
    if K := about.model.n_class:
        named = about.classes if len(about.classes) == K else [str(k) for k in range(K)]
        found[FINE_TUNED] = list(named)
    return found | {name: head.classes for name, head in heads.items() if head.release == about.sha256}
