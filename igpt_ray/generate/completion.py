"""Completions of images by a model in this process, and a figure of them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_ray.data import pixels as images
from igpt_ray.data.image_files import RGB
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_format import Tokens
from igpt_ray.errors import SettingError
from igpt_ray.generate.engine import Engine, Request
from igpt_ray.generate.quantize import Precision
from igpt_ray.model.image_gpt import ImageGPT

TILE = 96
"""Approximate width of an image in a figure, in pixels."""
SLOTS = 32
"""Samples that `complete` generates at once. On a CPU, more of them are no faster and take more memory."""


def complete(
    model: ImageGPT,
    tokens: Tensor,
    n: int,
    seeds: list[int],
    temperature: float = 1,
    top_k: int = 0,
    top_p: float = 1,
    prompt_mask: Tensor | None = None,
) -> Tensor:
    """Complete each image n times: prompt tokens (B, S) -> (B * n, T); the samples of an image are consecutive.

    With `prompt_mask` (B, T), True for the pixels of the prompt, `tokens` are (B, T) as well, and ignored elsewhere.
    `seeds` holds one seed per sample (B * n). Computes in the precision of the model. Raises `SettingError` if the
    prompt is longer than an image.
    """
    (B, S), T = tokens.shape, model.config.n_positions
    if S > T:
        raise SettingError(f"the prompt has {S} pixels, expected at most the {T} of an image")
    pixels = F.pad(tokens.cpu(), (0, T - S)).numpy()
    forced = ((torch.arange(T) < S).expand(B, T) if prompt_mask is None else prompt_mask.cpu()).numpy()
    precision: Precision = "float32" if model.wpe.dtype == torch.float32 else "bfloat16"
    # On CUDA, torch.compile would take longer than the completions.
    engine = Engine(model, min(len(seeds), SLOTS), precision, compiled=False)
    generations = []
    for sample in range(0, B * n, n):
        for start in range(sample, sample + n, engine.slots):
            mine = tuple(seeds[start : min(start + engine.slots, sample + n)])
            picture = sample // n
            generations.append(
                engine.submit(Request(pixels[picture], forced[picture], mine, temperature, top_k, top_p))
            )
    while engine.waiting or engine.slots_in_use:
        engine.step()
    return torch.from_numpy(np.concatenate([generation.tokens for generation in generations]).astype(np.int64)).to(
        tokens.device
    )


def figure(palette: Palette, originals: Tokens, completions: Tokens, rows: int) -> RGB:
    """One row per image: prompt, completions, quantised original. (N, T), (N, n, T) -> (H, W, 3)."""
    n_px = int(originals.shape[1] ** 0.5)
    sampled = []
    for original, completed in zip(originals, completions, strict=True):
        whole = palette.decode(original).reshape(n_px, n_px, 3)
        given = whole.copy()
        given[rows:] = 128  # free pixels are grey
        sampled.append([given, *palette.decode(completed).reshape(-1, n_px, n_px, 3), whole])
    return images.sheet(sampled, scale=max(1, TILE // n_px), wide_gaps=(1, 1 + completions.shape[1]))
