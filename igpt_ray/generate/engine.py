"""Continuous batching: image completions generated together, one position per step; on CUDA up to a row per step.

Requests are added and removed between steps. The prompt before the first free pixel is processed in one pass for all
samples of a request; prompt pixels after it are forced when their position is reached. A sample depends only on its
request and its seed: `kv_cache.py` makes the arithmetic independent of the batch, and each sample has its own random
numbers.
"""

import itertools
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
from igpt_ray.data.token_format import Tokens
from igpt_ray.errors import SettingError
from igpt_ray.generate import sampler
from igpt_ray.generate.device_loop import DeviceLoop
from igpt_ray.generate.kv_cache import KVCache
from igpt_ray.generate.quantize import Precision
from igpt_ray.model.image_gpt import ImageGPT


@dataclass(frozen=True, eq=False)
class Request:
    """An image to complete once per seed."""

    tokens: NDArray[np.integer]
    """(T,) tokens in raster order. Values outside the prompt are ignored."""
    prompt_mask: NDArray[np.bool_]
    """(T,) True for the pixels of the prompt, which stay as they are."""
    seeds: tuple[int, ...]
    temperature: float = 1
    top_k: int = 0
    top_p: float = 1


class Generation:
    """A request in progress. Any thread may read it; only the engine writes."""

    def __init__(self, request: Request):
        T, free_pixels = len(request.prompt_mask), np.flatnonzero(~request.prompt_mask)
        self.request = request
        self.tokens: Tokens = np.zeros((len(request.seeds), T), np.uint16)
        """(samples, T): the prompt at first, then each pixel as it is generated."""
        self.tokens[:, request.prompt_mask] = request.tokens[request.prompt_mask]
        self.position = int(free_pixels[0]) if len(free_pixels) else T
        """Number of positions that all samples have completed."""
        self.end = int(free_pixels[-1]) + 1 if len(free_pixels) else T
        """One more than the last free position."""
        self.finished = not len(free_pixels)
        self.cancelled = False


class Sample(NamedTuple):
    """The sample in a slot."""

    generation: Generation
    number: int
    """Index among the samples of the generation."""
    uniforms: Tensor
    """(T,) random numbers, one per pixel."""


class Engine:
    """Generates up to `slots` samples at a time. Any thread may call `submit` and `cancel`; one thread calls `step`."""

    def __init__(
        self,
        model: ImageGPT,
        slots: int,
        precision: Precision = "float32",
        device_loop: bool | None = None,
        compiled: bool | None = None,
        fused: bool = True,
    ):
        """`device_loop`: advance up to a row per step, with one wait for the device; None for only on CUDA.
        `compiled`: see `DeviceLoop`; `fused`: see `KVCache`. Both concern CUDA alone.

        Raises `SettingError` for a model with the masked objective.
        """
        self.slots = slots
        self.generated = 0
        """Pixels generated since the start, over all samples."""
        self._shape = model.config
        self._network = KVCache(model, slots, precision, fused)
        on_device = model.wpe.is_cuda if device_loop is None else device_loop
        self._device_loop = DeviceLoop(self._network, compiled) if on_device else None
        self._lock = threading.Lock()
        self._waiting: deque[Generation] = deque()
        self._samples_of_slots: list[Sample | None] = [None] * slots

    @property
    def slots_in_use(self) -> int:
        return sum(not sample.generation.cancelled for sample in self._active().values())

    @property
    def waiting(self) -> int:
        """Number of queued requests."""
        return len(self._waiting)

    def submit(self, request: Request) -> Generation:
        """Queue a request. If it has no free pixel it is finished at once, and no step returns it.

        Raises `SettingError` if the request is malformed.
        """
        self._check(request)
        generation = Generation(request)
        if not generation.finished:
            with self._lock:
                self._waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Free the slots before the next step; no step returns the generation. A finished one stays finished."""
        with self._lock:
            generation.cancelled = not generation.finished
            if generation in self._waiting:
                self._waiting.remove(generation)

    def step(self) -> list[Generation]:
        """Admit queued requests, then advance every active slot. Returns the finished generations.

        A step is one position; in the device loop it ends at the first end of a row or of a generation.
        """
        with self._lock:
            self._release()
            admitted = self._admit()
        if admitted:
            self._begin(admitted)
        active = self._active()
        if not active:
            return []
        slots, samples = list(active), list(active.values())
        steps = 1 if self._device_loop is None else self._positions_to_next_end(samples)
        colours = self._sample(slots, samples) if self._device_loop is None else self._run(slots, samples, steps)
        self._store(samples, colours)
        with self._lock:
            finished = self._advance(steps)
            self._release()
        return finished

    def _check(self, request: Request) -> None:
        T, V, tokens, mask = self._shape.n_positions, self._shape.n_vocab, request.tokens, request.prompt_mask
        if tokens.shape != (T,) or mask.shape != (T,):
            raise SettingError(f"tokens are {tokens.shape} and prompt_mask {mask.shape}, expected ({T},) of both")
        if not np.issubdtype(tokens.dtype, np.integer) or mask.dtype != np.bool_:
            raise SettingError(
                f"tokens are {tokens.dtype} and prompt_mask {mask.dtype}, expected integers and booleans"
            )
        for colour in tokens[mask]:
            if not 0 <= colour < V:
                raise SettingError(f"a prompt pixel has the token {colour}, expected 0 to {V - 1}")
        if not 1 <= len(request.seeds) <= self.slots:
            raise SettingError(
                f"{len(request.seeds)} samples were requested, expected 1 to {self.slots}: send several requests"
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
        """Free the slots of finished and cancelled generations."""
        for slot, sample in self._active().items():
            if sample.generation.cancelled or sample.generation.finished:
                self._samples_of_slots[slot] = None

    def _active(self) -> dict[int, Sample]:
        """The samples in use by slot."""
        return {slot: sample for slot, sample in enumerate(self._samples_of_slots) if sample is not None}

    def _admit(self) -> list[Generation]:
        """Assign free slots in FIFO order: a large request at the head blocks smaller ones, to avoid starvation."""
        free = [slot for slot, held in enumerate(self._samples_of_slots) if held is None]
        admitted = []
        while self._waiting and len(self._waiting[0].request.seeds) <= len(free):
            generation = self._waiting.popleft()
            admitted.append(generation)
            uniforms = rng.uniforms(list(generation.request.seeds), self._shape.n_positions)
            for number, stream in enumerate(uniforms):
                self._samples_of_slots[free.pop(0)] = Sample(generation, number, stream)
        return admitted

    def _begin(self, admitted: list[Generation]) -> None:
        """Process the prompts before the first free pixels; prompts of equal length together."""
        active = {slot: sample for slot, sample in self._active().items() if sample.generation in admitted}
        for length, group in itertools.groupby(sorted(admitted, key=_position), key=_position):
            if length:
                generations = list(group)
                slots = [[slot for slot, sample in active.items() if sample.generation is g] for g in generations]
                prompts = np.stack([generation.tokens[0, :length] for generation in generations]).astype(np.int64)
                self._network.prefill_all(slots, torch.from_numpy(prompts))
        if self._device_loop is not None:
            samples = active.values()
            requests = [sample.generation.request for sample in samples]
            self._device_loop.load(
                list(active),
                torch.from_numpy(np.stack([s.generation.tokens[s.number] for s in samples]).astype(np.int64)),
                torch.from_numpy(np.stack([request.prompt_mask for request in requests])),
                torch.stack([sample.uniforms for sample in samples]),
                [request.temperature for request in requests],
                [min(request.top_k, self._shape.n_vocab) for request in requests],
                [request.top_p for request in requests],
            )

    def _sample(self, slots: list[int], samples: list[Sample]) -> NDArray[np.integer]:
        """A colour for each slot (slots, 1). At a prompt pixel only the keys and values are stored."""
        positions = [sample.generation.position for sample in samples]
        previous_tokens = [
            int(s.generation.tokens[s.number, max(t, 1) - 1]) for s, t in zip(samples, positions, strict=True)
        ]
        logits = self._network.decode_step(slots, positions, previous_tokens)  # (slots, V)
        requests = [sample.generation.request for sample in samples]
        colours = sampler.sample_inverse_cdf(
            logits,
            torch.stack([sample.uniforms[t] for sample, t in zip(samples, positions, strict=True)]).to(logits.device),
            torch.tensor([request.temperature for request in requests], dtype=torch.float64),
            torch.tensor([min(request.top_k, self._shape.n_vocab) for request in requests]),
            torch.tensor([request.top_p for request in requests], dtype=torch.float64),
        )
        return colours[:, None].cpu().numpy()

    def _positions_to_next_end(self, samples: list[Sample]) -> int:
        """Positions until a sample reaches the end of a row, whose tokens can then be read, or of its generation."""
        n_px = self._shape.n_px
        return min(min(n_px - g.position % n_px, g.end - g.position) for g in (s.generation for s in samples))

    def _run(self, slots: list[int], samples: list[Sample], steps: int) -> NDArray[np.integer]:
        """Colours for the next `steps` positions of each slot, (slots, steps)."""
        assert self._device_loop is not None
        positions = [sample.generation.position for sample in samples]
        requests = [sample.generation.request for sample in samples]
        filtered = any(request.top_k > 0 or request.top_p < 1 for request in requests)
        tokens = self._device_loop.run(slots, positions, steps, filtered).numpy()
        return np.stack([tokens[slot, t : t + steps] for slot, t in zip(slots, positions, strict=True)])

    def _store(self, samples: list[Sample], colours: NDArray[np.integer]) -> None:
        """Store each sample's next colours, (samples, steps), at its free pixels."""
        for sample, new in zip(samples, colours, strict=True):
            generation, here = (
                sample.generation,
                slice(sample.generation.position, sample.generation.position + len(new)),
            )
            free = ~generation.request.prompt_mask[here]
            generation.tokens[sample.number, here][free] = new[free]
            self.generated += int(free.sum())

    def _advance(self, steps: int) -> list[Generation]:
        """Advance every generation by `steps` positions; returns those that are finished."""
        finished = []
        for generation in dict.fromkeys(sample.generation for sample in self._active().values()):
            generation.position += steps
            if generation.position == generation.end:
                generation.position = len(generation.request.prompt_mask)
                if not generation.cancelled:
                    generation.finished = True
                    finished.append(generation)
        return finished


def _position(generation: Generation) -> int:
    return generation.position
