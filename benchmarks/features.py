"""Features of the first layers of a network, compared with transformers' ImageGPT with all hidden states.

Both have the same random weights and read the same tokens. transformers has no option to stop early: it runs all blocks
and the head, after which the hidden states of the requested layers pass through ln_1 and are averaged over positions.
`largest_difference` is the largest absolute difference between the two, divided by the features' standard deviation.
"""

import statistics
import tempfile
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from benchmarks.timing import in_turn, median_ratio
from benchmarks.train import shifted
from igpt_ray import weights
from igpt_ray.evaluate.features import pooled
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.settings import Count, Section

Extractor = Callable[[], Tensor]
"""Returns features (images, layers, C)."""


class BenchFeaturesConfig(Section):
    """Compare features of the first layers of iGPT-S with transformers' ImageGPT with all hidden states."""

    n_layer: Count = 24
    """Blocks of the network."""
    last_layer: Annotated[int, Field(ge=0)] = 12
    """Last layer to compute features of; its features need this many blocks."""
    images: Count = 4
    """Images per forward pass."""
    rounds: Count = 5
    """Repetitions; results are medians over them."""
    threads: Count = 2
    """Threads of torch."""


def features(settings: BenchFeaturesConfig) -> dict[str, Any]:
    """Return, for float32 and bfloat16, the speed of each implementation and the largest difference."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    config = ModelConfig(n_layer=settings.n_layer)
    model = ImageGPT(config).eval().requires_grad_(False)
    tokens = torch.randint(0, config.n_vocab, (settings.images, config.n_positions))
    return {
        "n_layer": settings.n_layer,
        "last_layer": settings.last_layer,
        "images": settings.images,
        "threads": settings.threads,
        **{name: compare(model, tokens, getattr(torch, name), settings) for name in ("float32", "bfloat16")},
    }


def compare(model: ImageGPT, tokens: Tensor, dtype: torch.dtype, settings: BenchFeaturesConfig) -> dict[str, Any]:
    """Speeds; `faster` is the ratio of transformers' time to ours."""
    extractors: dict[str, Extractor] = {
        "ours": ours(model, tokens, dtype, settings.last_layer, compiled=False),
        "ours compiled": ours(model, tokens, dtype, settings.last_layer, compiled=True),
        "transformers": transformers(model, tokens, dtype, settings.last_layer),
    }
    in_turn(extractors, 1)  # compiles and allocates
    runs = in_turn(extractors, settings.rounds)
    expected = runs.results["transformers"]
    report: dict[str, Any] = {
        "largest_difference": float((runs.results["ours"] - expected).abs().max() / expected.std())
    }
    for suffix, seconds in (("", runs.wall), ("_cpu", runs.cpu)):
        rates = {name: round(len(tokens) / statistics.median(times), 3) for name, times in seconds.items()}
        report[f"images_per{suffix}_second"] = rates
        report[f"faster{suffix}"] = {
            name: round(median_ratio(seconds["transformers"], times), 2)
            for name, times in seconds.items()
            if name != "transformers"
        }
    return report


def ours(model: ImageGPT, tokens: Tensor, dtype: torch.dtype, last: int, compiled: bool) -> Extractor:
    copy = ImageGPT(model.config).eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    copy.to(dtype)
    if compiled:
        for block in copy.blocks:
            block.compile()
    rows, layers = tokens.numpy().astype(np.uint16), list(range(last + 1))
    return lambda: torch.from_numpy(pooled(copy, rows, [""] * len(rows), layers, "mean", len(rows)))


def transformers(model: ImageGPT, tokens: Tensor, dtype: torch.dtype, last: int) -> Extractor:
    from transformers import ImageGPTForCausalImageModeling

    with tempfile.TemporaryDirectory() as folder:
        weights.save_hf(model, folder)
        reference = ImageGPTForCausalImageModeling.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def extract() -> Tensor:
        states = reference(shifted(tokens, model.config), output_hidden_states=True).hidden_states
        blocks = list(reference.transformer.h)[: last + 1]
        pooled_states = [block.ln_1(h).mean(1) for block, h in zip(blocks, states, strict=False)]
        if last == len(reference.transformer.h):
            pooled_states.append(states[-1].mean(1))  # transformers applies ln_f to the last state
        return torch.stack(pooled_states, 1).float()

    return extract
