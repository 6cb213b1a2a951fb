"""Features of the first half of a network beside transformers' ImageGPT with all hidden states, taking turns.

Both have the same random weights and see the same tokens, ours with its start vector and transformers' behind its start
token. transformers has no way to stop early: it runs all blocks and the head, and the hidden states wanted are put
through ln_1 and averaged. `largest_difference` is between the two ways, relative to the features' deviation.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from benchmarks.train import shifted
from igpt_ray import weights
from igpt_ray.evaluate.features import pooled
from igpt_ray.model.config import ModelConfig as Shape
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.settings import Count, Section

Way = Callable[[], Tensor]
"""Features (images, layers, C)."""


class BenchFeaturesConfig(Section):
    """Features of the first layers of iGPT-S beside transformers' with all hidden states."""

    n_layer: Count = 24
    """Blocks of the network."""
    last_layer: Annotated[int, Field(ge=0)] = 12
    """The last layer wanted; its features take this many blocks."""
    images: Count = 4
    """Images of a forward pass."""
    rounds: Count = 5
    """How often each takes its turn; figures are medians."""
    threads: Count = 2
    """Of torch."""


def features(settings: BenchFeaturesConfig) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    shape = Shape(n_layer=settings.n_layer)
    model = ImageGPT(shape).eval().requires_grad_(False)
    tokens = torch.randint(0, shape.n_vocab, (settings.images, shape.n_positions))
    return {
        "n_layer": settings.n_layer,
        "last_layer": settings.last_layer,
        "images": settings.images,
        "threads": settings.threads,
        **{name: compared(model, tokens, getattr(torch, name), settings) for name in ("float32", "bfloat16")},
    }


def compared(model: ImageGPT, tokens: Tensor, dtype: torch.dtype, settings: BenchFeaturesConfig) -> dict[str, Any]:
    ways: dict[str, Way] = {
        "ours": ours(model, tokens, dtype, settings.last_layer, compiled=False),
        "ours compiled": ours(model, tokens, dtype, settings.last_layer, compiled=True),
        "transformers": transformers(model, tokens, dtype, settings.last_layer),
    }
    found = {name: way() for name, way in ways.items()}  # once before the clock: whatever is compiled, or made once
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(settings.rounds):
        for name, way in ways.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            way()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - cpu_started)
    ratio = {clock: _over(taken, "transformers") for clock, taken in (("wall", wall), ("cpu", cpu))}
    away = (found["ours"] - found["transformers"]).abs().max() / found["transformers"].std()
    return {
        "images_per_second": {name: round(len(tokens) / statistics.median(wall[name]), 3) for name in ways},
        "images_per_cpu_second": {name: round(len(tokens) / statistics.median(cpu[name]), 3) for name in ways},
        "faster": ratio["wall"],
        "faster_cpu": ratio["cpu"],
        "largest_difference": float(away),
    }


def _over(taken: dict[str, list[float]], other: str) -> dict[str, float]:
    """Medians over rounds of how much faster each way is than the other one in the same round."""
    return {
        name: round(statistics.median(b / a for a, b in zip(times, taken[other], strict=True)), 2)
        for name, times in taken.items()
        if name != other
    }


def ours(model: ImageGPT, tokens: Tensor, dtype: torch.dtype, last: int, compiled: bool) -> Way:
    copy = ImageGPT(model.config).eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    copy.to(dtype)
    if compiled:
        for block in copy.blocks:
            block.compile()
    rows, layers = tokens.numpy().astype(np.uint16), list(range(last + 1))
    return lambda: torch.from_numpy(pooled(copy, rows, [""] * len(rows), layers, "mean", len(rows)))


def transformers(model: ImageGPT, tokens: Tensor, dtype: torch.dtype, last: int) -> Way:
    from transformers import ImageGPTForCausalImageModeling

    with tempfile.TemporaryDirectory() as folder:
        weights.save_hf(model, folder)
        theirs = ImageGPTForCausalImageModeling.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def way() -> Tensor:
        states = theirs(shifted(tokens, model.config), output_hidden_states=True).hidden_states
        blocks = list(theirs.transformer.h)[: last + 1]
        pooled_states = [block.ln_1(h).mean(1) for block, h in zip(blocks, states, strict=False)]
        if last == len(theirs.transformer.h):
            pooled_states.append(states[-1].mean(1))  # it has been through ln_f
        return torch.stack(pooled_states, 1).float()

    return way
