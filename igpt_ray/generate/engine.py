"""Continuous batching: requests for finished pictures, painted side by side, a position at a time.

Requests join and leave between steps. Of a request, what is given before the first pixel to paint goes through the
network in one pass, for all its samples; pixels given later are forced as they come. A sample is a function of its
request and its seed alone: `generate/kv_cache.py` sees to the arithmetic, and its random numbers are its own.
"""

import sys
import threading
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt_ray import rng
from igpt_ray.data.token_store import Tokens
from igpt_ray.errors import SettingError
from igpt_ray.generate import sampler
from igpt_ray.generate.kv_cache import KVCache, Precision
from igpt_ray.model.image_gpt import ImageGPT


@dataclass(frozen=True, eq=False)
class Request:
    """A picture to be finished once for every seed."""

    tokens: NDArray[np.integer]
    """(T,) colours in raster order; anything where not given."""
    given: NDArray[np.bool_]
    """(T,) the pixels that stay as they are: any of them."""
    seeds: tuple[int, ...]
    temperature: float = 1
    top_k: int = 0
    top_p: float = 1


class Generation:
    """A request on its way. To be read by any thread; only the engine writes."""

    def __init__(self, request: Request):
        T, to_paint = len(request.given), np.flatnonzero(~request.given)
        self.request = request
        self.tokens: Tokens = np.zeros((len(request.seeds), T), np.uint16)
        """(samples, T), filled as they are painted; what is given is there from the start."""
        self.tokens[:, request.given] = request.tokens[request.given]
        self.position = int(to_paint[0]) if len(to_paint) else T
        """How many positions all samples have finished."""
        self.end = int(to_paint[-1]) + 1 if len(to_paint) else T
        """Behind the last pixel to be painted."""
        self.finished = not len(to_paint)
        self.cancelled = False


class Sample(NamedTuple):
    """What a slot holds."""

    ticket: Generation
    number: int
    """Among those of the ticket."""
    uniforms: Tensor
    """(T,) one for each pixel."""


class Engine:
    """`slots` samples at a time. `submit` and `cancel` are for any thread, `step` for one."""

    def __init__(self, model: ImageGPT, slots: int, precision: Precision = "float32"):
        """Raises `SettingError` for a masked network: it has no next pixel."""
        self.slots = slots
        self.generated = 0
        """Pixels drawn since the start, of all samples."""
        self._shape = model.config
        self._network = KVCache(model, slots, precision)
        self._lock = threading.Lock()
        self._waiting: deque[Generation] = deque()
        self._held: list[Sample | None] = [None] * slots

    @property
    def slots_in_use(self) -> int:
        return sum(held is not None and not held.ticket.cancelled for held in self._held)

    @property
    def waiting(self) -> int:
        """Requests for which there were not enough slots yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> Generation:
        """Queue a request. One with nothing to paint comes back finished, and no step returns it.

        Raises `SettingError` if it is malformed.
        """
        self._check(request)
        ticket = Generation(request)
        if not ticket.finished:
            with self._lock:
                self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Generation) -> None:
        """Its slots are free before the next step, and no step returns it. A finished one stays finished."""
        with self._lock:
            ticket.cancelled = not ticket.finished
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def step(self) -> list[Generation]:
        """One position for every slot in use, after admitting who waits. Returns who has finished."""
        with self._lock:
            self._release()
            admitted = self._admit()
        for ticket in admitted:
            self._begin(ticket)
        slots = [slot for slot, held in enumerate(self._held) if held is not None]
        if not slots:
            return []
        self._paint(slots, [held for held in self._held if held is not None])
        with self._lock:
            finished = self._advance()
            self._release()
        return finished

    def _check(self, request: Request) -> None:
        T, V = self._shape.n_positions, self._shape.n_vocab
        if request.tokens.shape != (T,) or request.given.shape != (T,):
            raise SettingError(
                f"tokens are {request.tokens.shape} and given {request.given.shape}, expected ({T},) of both"
            )
        if not np.issubdtype(request.tokens.dtype, np.integer) or request.given.dtype != np.bool_:
            raise SettingError(
                f"tokens are {request.tokens.dtype} and given {request.given.dtype}, expected integers and booleans"
            )
        for colour in request.tokens[request.given]:
            if not 0 <= colour < V:
                raise SettingError(f"a given pixel has the colour {colour}, expected 0 to {V - 1}")
        if not 1 <= len(request.seeds) <= self.slots:
            raise SettingError(
                f"{len(request.seeds)} samples are wanted, expected 1 to {self.slots}: send several requests"
            )
        for seed in request.seeds:
            if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**128:
                raise SettingError(f"a seed is {seed}, expected an integer from 0 to 2^128 - 1")
        if not 0 <= request.temperature <= sys.float_info.max:
            raise SettingError(f"temperature is {request.temperature}, expected 0 (the likeliest colour) or more")
        if not isinstance(request.top_k, int | np.integer) or request.top_k < 0:
            raise SettingError(f"top_k is {request.top_k}, expected an integer: 0 (all colours) or more")
        if not 0 < request.top_p <= 1:
            raise SettingError(f"top_p is {request.top_p}, expected more than 0 and at most 1 (all colours)")

    def _release(self) -> None:
        """Free the slots of what is over."""
        for slot, held in enumerate(self._held):
            if held is not None and (held.ticket.cancelled or held.ticket.finished):
                self._held[slot] = None

    def _admit(self) -> list[Generation]:
        """Give slots to who waits, in order: who does not fit yet is not overtaken, or many samples would starve."""
        free = [slot for slot, held in enumerate(self._held) if held is None]
        admitted = []
        while self._waiting and len(self._waiting[0].request.seeds) <= len(free):
            ticket = self._waiting.popleft()
            admitted.append(ticket)
            uniforms = rng.uniforms(list(ticket.request.seeds), self._shape.n_positions)
            for number, stream in enumerate(uniforms):
                self._held[free.pop(0)] = Sample(ticket, number, stream)
        return admitted

    def _begin(self, ticket: Generation) -> None:
        """Fill its slots with what is given before the first pixel to paint."""
        if ticket.position:
            slots = [slot for slot, held in enumerate(self._held) if held is not None and held.ticket is ticket]
            self._network.fill(slots, torch.from_numpy(ticket.tokens[0, : ticket.position].astype(np.int64)))

    def _paint(self, slots: list[int], samples: list[Sample]) -> None:
        """Draw the colour of every sample's next pixel. A given one was there before: only its keys were wanted."""
        at = [sample.ticket.position for sample in samples]
        before = [int(s.ticket.tokens[s.number, max(t, 1) - 1]) for s, t in zip(samples, at, strict=True)]
        logits = self._network.logits(slots, at, before)  # (slots, V)
        asked = [sample.ticket.request for sample in samples]
        colours = sampler.sample_inverse_cdf(
            logits,
            torch.stack([sample.uniforms[t] for sample, t in zip(samples, at, strict=True)]).to(logits.device),
            torch.tensor([request.temperature for request in asked], dtype=torch.float64),
            torch.tensor([min(request.top_k, self._shape.n_vocab) for request in asked]),
            torch.tensor([request.top_p for request in asked], dtype=torch.float64),
        ).tolist()
        for sample, t, colour in zip(samples, at, colours, strict=True):
            if not sample.ticket.request.given[t]:
                sample.ticket.tokens[sample.number, t] = colour
                self.generated += 1

    def _advance(self) -> list[Generation]:
        """Move every ticket on by a position; returns those that have come to their end."""
        finished = []
        for ticket in dict.fromkeys(held.ticket for held in self._held if held is not None):
            ticket.position += 1
            if ticket.position == ticket.end:
                ticket.position = len(ticket.request.given)
                if not ticket.cancelled:
                    ticket.finished = True
                    finished.append(ticket)
        return finished
