"""Continuous batching: requests for finished pictures, painted a position at a time in a fixed number of lanes.

A lane holds the keys and values of one sample and stands at a position of its own. Requests join and leave between
steps. What is given before the first pixel to paint goes through the network in one pass, for all samples of a request;
pixels given later are forced as they come. A sample depends on its request and its seed alone: every product is over
all lanes, used or not, and attention over a lane by itself, so that nothing is computed in another way beside others.
"""

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from igpt_ray import sampling
from igpt_ray.errors import SettingError
from igpt_ray.model import Attention, ImageGPT, turned
from igpt_ray.shards import Tokens


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


class Ticket:
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


class Engine:
    """`lanes` samples at a time. `submit` and `cancel` are for any thread, `step` for one."""

    def __init__(self, model: ImageGPT, lanes: int):
        """Raises `SettingError` for a masked network: it has no next pixel."""
        if not model.causal:
            raise SettingError("a masked network has no next pixel: completions need one with the objective next")
        c, like = model.config, model.wpe
        self.model = model
        self.lanes = lanes
        self.kv = torch.zeros(
            (c.n_layer, 2, lanes, c.n_head, c.n_positions, c.head_width), dtype=like.dtype, device=like.device
        )
        self.turns = model.rotation(0, c.n_positions)
        self.painted = 0
        """Tokens made since the start."""
        self._lock = threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._held: list[tuple[Ticket, int] | None] = [None] * lanes
        """Of each lane, the ticket and which of its samples."""
        self._uniforms = torch.zeros(lanes, c.n_positions, dtype=torch.float64)

    @property
    def lanes_in_use(self) -> int:
        return sum(held is not None and not held[0].cancelled for held in self._held)

    @property
    def waiting(self) -> int:
        """Requests that no lane was free for yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> Ticket:
        """Queue a request. One with nothing to paint comes back finished, and no step will return it.

        Raises `SettingError` if it is malformed.
        """
        self._check(request)
        ticket = Ticket(request)
        if not ticket.finished:
            with self._lock:
                self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Its lanes are free before the next step. Does nothing to a ticket that is finished."""
        with self._lock:
            ticket.cancelled = not ticket.finished
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    @torch.inference_mode()
    def step(self) -> list[Ticket]:
        """One position for every lane in use, after admitting who waits, in order. Returns who has finished."""
        with self._lock:
            self._held = [None if held and held[0].cancelled else held for held in self._held]
            admitted = self._admit()
        for ticket in admitted:
            self._prefill(ticket)
        if not any(self._held):
            return []
        logits = self._forward()
        for lane, held in enumerate(self._held):
            if held is not None:
                self._paint(*held, logits[lane], self._uniforms[lane])
        done = []
        with self._lock:
            for ticket in dict.fromkeys(held[0] for held in self._held if held):
                ticket.position += 1
                if ticket.position == ticket.end:
                    ticket.position = len(ticket.request.given)
                    if not ticket.cancelled:
                        ticket.finished = True
                        done.append(ticket)
            self._held = [None if held and held[0].finished else held for held in self._held]
        return done

    def _check(self, request: Request) -> None:
        T, V = self.model.config.n_positions, self.model.config.n_vocab
        if request.tokens.shape != (T,) or request.given.shape != (T,):
            raise SettingError(f"tokens {request.tokens.shape} and given {request.given.shape} are to be ({T},) each")
        if request.given.dtype != np.bool_ or not np.issubdtype(request.tokens.dtype, np.integer):
            raise SettingError(
                f"tokens are {request.tokens.dtype} and given {request.given.dtype}, expected integers and booleans"
            )
        forced = request.tokens[request.given]
        if len(forced) and not 0 <= forced.min() <= forced.max() < V:
            raise SettingError(f"a given colour is {forced.min()} or {forced.max()}: there are colours 0 to {V - 1}")
        if not 0 < len(request.seeds) <= self.lanes:
            raise SettingError(
                f"{len(request.seeds)} samples of a picture: at least 1 and at most {self.lanes} go at once"
            )
        if min(request.seeds) < 0 or max(request.seeds) >= 2**128:
            raise SettingError("a seed is negative or beyond 2^128")
        if not 0 <= request.temperature < float("inf"):
            raise SettingError(f"temperature is {request.temperature}, expected 0 or more")
        if request.top_k < 0:
            raise SettingError(f"top_k is {request.top_k}, expected 0 (all colours) or more")
        if not 0 < request.top_p <= 1:
            raise SettingError(f"top_p is {request.top_p}, expected more than 0 and at most 1")

    def _admit(self) -> list[Ticket]:
        """Give lanes to who waits, in order: who does not fit is not overtaken."""
        admitted = []
        free = [lane for lane, held in enumerate(self._held) if held is None]
        while self._waiting and len(self._waiting[0].request.seeds) <= len(free):
            ticket = self._waiting.popleft()
            for sample in range(len(ticket.request.seeds)):
                self._held[free.pop(0)] = (ticket, sample)
            admitted.append(ticket)
        return admitted

    def _prefill(self, ticket: Ticket) -> None:
        """The positions before the first pixel to be painted, in one pass; all samples get a copy."""
        mine = [lane for lane, held in enumerate(self._held) if held is not None and held[0] is ticket]
        self._uniforms[mine] = sampling.uniforms(list(ticket.request.seeds), self.model.config.n_positions)
        S = ticket.position
        if not S:
            return
        first, model = mine[0], self.model
        tokens = torch.from_numpy(ticket.tokens[:1, :S].astype(np.int64)).to(self.kv.device)
        h, turn = model.embed(tokens), model.rotation(0, S)
        for block, kv in zip(model.h, self.kv, strict=True):
            h = block(h, turn, kv[:, first : first + 1])
        for lane in mine[1:]:
            self.kv[:, :, lane, :, :S] = self.kv[:, :, first, :, :S]

    def _forward(self) -> Tensor:
        """The logits of the pixel each lane stands at: (lanes, V)."""
        model, device = self.model, self.kv.device
        at = torch.tensor([held[0].position if held else 0 for held in self._held], device=device)
        before = [
            int(held[0].tokens[held[1], held[0].position - 1]) if held and held[0].position else 0
            for held in self._held
        ]
        h = torch.where(at[:, None] > 0, model.wte(torch.tensor(before, device=device)), model.sos) + model.wpe[at]
        turn = None if self.turns is None else self.turns[:, at, None, None]  # (2, lanes, 1, 1, D / 2)
        for block, kv in zip(model.blocks, self.kv, strict=True):
            h = h + self._attend(block.attn, block.ln_1(h), turn, kv, at)
            h = h + block.mlp(block.ln_2(h))
        return model.wtet(model.ln_f(h))

    def _attend(self, attn: Attention, x: Tensor, turn: Tensor | None, kv: Tensor, at: Tensor) -> Tensor:
        """(lanes, C) -> (lanes, C), every lane over its own positions."""
        q, k, v = attn.c_attn(x).view(len(x), 3, attn.n_head, 1, -1).unbind(1)  # each (lanes, N, 1, D)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if turn is not None:
            q, k = turned(q, turn), turned(k, turn)
        y = torch.zeros_like(q)
        for lane, held in enumerate(self._held):
            if held is None:
                continue
            t, one = held[0].position, slice(lane, lane + 1)
            kv[:, lane, :, t] = torch.stack([k[lane, :, 0], v[lane, :, 0]])
            y[one] = F.scaled_dot_product_attention(q[one], kv[0, one, :, : t + 1], kv[1, one, :, : t + 1])
        return attn.c_proj(y.reshape(len(x), -1))

    def _paint(self, ticket: Ticket, sample: int, logits: Tensor, uniforms: Tensor) -> None:
        request, t = ticket.request, ticket.position
        if request.given[t]:
            return
        u = uniforms[t : t + 1].to(logits.device)
        ticket.tokens[sample, t] = int(sampling.pick(logits[None], u, request.temperature, request.top_k))
        self.painted += 1
