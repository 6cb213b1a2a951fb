"""Sampling of image completions, one pixel at a time.

Every sample has its own stream of uniform random numbers, a function of its seed and the position. A token is sampled
by inverting the cumulative distribution. A sample therefore depends neither on the rest of the batch nor on the length
of the prompt.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_ray.data import pixels as images
from igpt_ray.data.image_files import RGB
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_format import Tokens
from igpt_ray.errors import SettingError
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
    from igpt_ray.generate.engine import Engine, Request  # imported here because the engine imports this module

    (B, S), T = tokens.shape, model.config.n_positions
    if S > T:
        raise SettingError(f"the prompt has {S} pixels, expected at most the {T} of an image")
    pixels = F.pad(tokens.cpu(), (0, T - S)).numpy()
    forced = ((torch.arange(T) < S).expand(B, T) if prompt_mask is None else prompt_mask.cpu()).numpy()
    engine = Engine(model, min(len(seeds), SLOTS), "float32" if model.wpe.dtype == torch.float32 else "bfloat16")
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


def sample_inverse_cdf(
    logits: Tensor,
    u: Tensor,
    temperature: float | Tensor = 1,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1,
) -> Tensor:
    """Sample by inverting the cumulative distribution at u: logits (B, V), u (B,) -> tokens (B,).

    Temperature 0 takes the most likely token. top_k > 0 keeps the k most likely tokens; top_p < 1 then keeps the
    smallest set of most likely tokens with at least this probability. Ties with the last kept token are kept as well.
    Each of the three is a number or a tensor (B,).
    """
    V = logits.shape[-1]
    k, mass = torch.as_tensor(top_k), torch.as_tensor(top_p, dtype=torch.float64)
    temperatures = torch.as_tensor(temperature, dtype=torch.float64, device=logits.device).expand(len(logits))
    below = logits.double() - logits.amax(-1, keepdim=True)  # at most 0, so that a small temperature cannot overflow
    p = (below / torch.where(temperatures > 0, temperatures, 1)[:, None]).softmax(-1)  # (B, V)
    if (k > 0).any() or (mass < 1).any():
        p = p * (p >= _least_kept(p, k.to(p.device), mass.to(p.device)))
    cumulative = p.cumsum(-1)
    target = u[:, None] * cumulative[:, -1:]
    sampled = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_max(V - 1)
    return torch.where(temperatures > 0, sampled, logits.argmax(-1))


def _least_kept(p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probability of the least likely token kept by top_k and then top_p: (B, V) -> (B, 1); 0 where neither is set."""
    V = p.shape[-1]
    top_k, top_p = (x.expand(len(p))[:, None] for x in (top_k, top_p))
    ordered = p.sort(-1, descending=True).values
    kth = ordered.gather(-1, torch.where(top_k > 0, top_k.clamp_max(V), V) - 1)
    kth = torch.where(top_k > 0, kth, 0)
    mass = (ordered * (ordered >= kth)).cumsum(-1)
    needed = F.pad(mass[:, :-1], (1, 0)) < top_p * mass[:, -1:]  # the more likely tokens do not reach top_p
    last = ordered.gather(-1, needed.sum(-1, keepdim=True) - 1)
    return torch.where(top_p < 1, torch.maximum(last, kth), kth)


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
