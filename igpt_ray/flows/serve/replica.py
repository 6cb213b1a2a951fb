"""A replica of a release: completions by the engine loop, and scores, features and classes by single forward passes."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from ray.util.metrics import Counter, Gauge, Histogram

from igpt_ray import weights
from igpt_ray.data.token_format import Tokens
from igpt_ray.evaluate import features
from igpt_ray.evaluate.features import Features, Pooling
from igpt_ray.evaluate.heads import Head, load_head
from igpt_ray.evaluate.likelihood import Nats, class_logits, pixel_nats
from igpt_ray.evaluate.logistic import probabilities
from igpt_ray.flows.device import assigned_device
from igpt_ray.generate.engine import Engine, Request
from igpt_ray.generate.quantize import Precision
from igpt_ray.serve.engine_loop import EngineLoop

BATCH = 16
"""Images per forward pass."""
FINE_TUNED = "fine-tuned"
"""Name of the head of a fine-tuned release."""
METRICS_INTERVAL_S = 0.5
"""Least time between updates of the metrics, which Ray collects every few seconds."""


class Replica:
    def __init__(self, name: str, release: str, heads: dict[str, str], slots: int, precision: Precision = "float32"):
        device = assigned_device()
        self.release_config = weights.load_config(release)
        weights.check_next(self.release_config, release)
        self.model = weights.load_release(release, device).model
        self.heads = {name: load_head(uri) for name, uri in heads.items()}
        self.networks = {"float32": self.model} | {
            head.precision: features.network(release, device, None, head.precision)
            for head in self.heads.values()
            if head.precision != "float32"
        }
        self.forward_lock = asyncio.Lock()
        self.loop = EngineLoop(
            Engine(self.model, slots, precision), self.release_config.model.n_px, PrometheusMetrics(name)
        )

    async def complete(self, request: Request) -> AsyncIterator[tuple[int, Tokens]]:
        """Yield (row, tokens (samples, n_px)) for every row with free pixels, once all samples have generated it.

        Closing the iterator cancels the request and frees its slots.
        """
        rows = self.loop.rows(request)
        try:
            async for row in rows:
                yield row
        finally:
            await rows.aclose()  # type: ignore[attr-defined]

    async def score(self, tokens: Tokens) -> Nats:
        """Tokens (N, T) -> nats (N, T)."""
        return await self._run_in_thread(pixel_nats, self.model, tokens, BATCH)

    async def features(self, tokens: Tokens, layer: int, pooling: Pooling) -> Features:
        """Tokens (N, T) -> features (N, C)."""
        pooled = await self._run_in_thread(features.pooled, self.model, tokens, [], [layer], pooling, BATCH)
        return pooled[:, 0]

    async def classify(self, tokens: Tokens, head: str) -> Nats:
        """Tokens (N, T) -> probabilities (N, classes)."""
        if head == FINE_TUNED:
            return probabilities(await self._run_in_thread(class_logits, self.model, tokens, [], BATCH))
        fitted = self.heads[head]
        return await self._run_in_thread(fitted.probabilities, self.networks[fitted.precision], tokens, [], BATCH)

    async def ready(self) -> bool:
        """Generate one pixel; returns True when it is done."""
        T = self.release_config.model.n_positions
        prompt_mask = np.arange(T) < T - 1
        async for _ in self.complete(Request(np.zeros(T, np.uint16), prompt_mask, (0,))):
            pass
        return True

    def check_health(self) -> None:
        """Raise the error that ended the engine loop, so that Serve replaces the replica."""
        if self.loop.failure is not None:
            raise self.loop.failure

    async def slots(self) -> tuple[int, int]:
        """Number of active slots, and of queued requests."""
        return self.loop.engine.slots_in_use, self.loop.engine.waiting

    async def _run_in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """One forward pass at a time, in a thread."""
        async with self.forward_lock:
            return await asyncio.to_thread(work, *arguments)


class PrometheusMetrics:
    """The metrics of a replica on Ray's Prometheus port."""

    def __init__(self, name: str):
        tags = ("model",)
        self.tags = {"model": name}
        self.slots = Gauge("igpt_slots_in_use", "Images being generated.", tags)
        self.waiting = Gauge("igpt_requests_waiting", "Queued requests.", tags)
        self.pixels = Counter("igpt_pixels_generated", "Generated pixels; the rate is the speed in tokens.", tags)
        self.first_row = Histogram(
            "igpt_first_row_seconds",
            "Time from the arrival of a request at a replica to its first row of pixels.",
            [0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
            tags,
        )
        self._counted, self._updated = 0, 0.0

    def observe_first_row(self, seconds: float) -> None:
        self.first_row.observe(seconds, self.tags)

    def update(self, engine: Engine, now: bool = False) -> None:
        if not now and time.monotonic() < self._updated + METRICS_INTERVAL_S:
            return
        self._updated = time.monotonic()
        self.slots.set(engine.slots_in_use, self.tags)
        self.waiting.set(engine.waiting, self.tags)
        if engine.generated > self._counted:
            self.pixels.inc(engine.generated - self._counted, self.tags)
            self._counted = engine.generated


def heads_of(release_config: weights.ReleaseConfig, heads: dict[str, Head]) -> dict[str, list[str]]:
    """Classes of the heads of a release: its own if it was fine-tuned, and the heads fitted on its features."""
    classes_of_heads = {}
    if K := release_config.model.n_class:
        names = release_config.classes if len(release_config.classes) == K else [str(k) for k in range(K)]
        classes_of_heads[FINE_TUNED] = list(names)
    return classes_of_heads | {
        name: head.classes for name, head in heads.items() if head.release == release_config.sha256
    }
