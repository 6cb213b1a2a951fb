"""Sampling: given pixels -> finished pictures, a pixel at a time.

Every sample has a stream of uniform numbers of its own, a function of its seed and the position, turned into a colour
by inverting the cumulative distribution. So a sample does not depend on what it was batched with, or on where the
given part ends.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_ray.data import pixels as images
from igpt_ray.data.image_files import RGB
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import Tokens
from igpt_ray.errors import SettingError
from igpt_ray.model.image_gpt import ImageGPT

TILE = 96
"""About how many pixels wide a picture is drawn in a figure."""
SLOTS = 32
"""Samples that `complete` paints at once: what more of them would gain on a CPU they would take in memory."""


def complete(
    model: ImageGPT,
    tokens: Tensor,
    n: int,
    seeds: list[int],
    temperature: float = 1,
    top_k: int = 0,
    top_p: float = 1,
    given: Tensor | None = None,
) -> Tensor:
    """Finish each picture n times: (B, S) given tokens -> (B * n, T), the samples of a picture side by side.

    With `given` (B, T), True where a pixel is to stay as it is, `tokens` are (B, T) too, anything elsewhere. `seeds`
    has one seed per sample (B * n). It is the engine that paints, in the precision of the network and up to `SLOTS`
    samples at a time. Raises `SettingError` if more is given than a picture has.
    """
    from igpt_ray.generate.engine import Engine, Request  # which draws with the functions below

    (B, S), T = tokens.shape, model.config.n_positions
    if S > T:
        raise SettingError(f"{S} pixels are given; a picture has {T}")
    pixels = F.pad(tokens.cpu(), (0, T - S)).numpy()
    forced = ((torch.arange(T) < S).expand(B, T) if given is None else given.cpu()).numpy()
    engine = Engine(model, min(len(seeds), SLOTS), "float32" if model.wpe.dtype == torch.float32 else "bfloat16")
    tickets = []
    for sample in range(0, B * n, n):
        for start in range(sample, sample + n, engine.slots):
            mine = tuple(seeds[start : min(start + engine.slots, sample + n)])
            picture = sample // n
            tickets.append(engine.submit(Request(pixels[picture], forced[picture], mine, temperature, top_k, top_p)))
    while engine.waiting or engine.slots_in_use:
        engine.step()
    return torch.from_numpy(np.concatenate([ticket.tokens for ticket in tickets]).astype(np.int64)).to(tokens.device)


def sample_inverse_cdf(
    logits: Tensor,
    u: Tensor,
    temperature: float | Tensor = 1,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1,
) -> Tensor:
    """The colour whose share of the cumulative distribution contains u: (B, V), (B,) -> (B,).

    Temperature 0 takes the likeliest colour; top_k > 0 leaves the k likeliest, top_p < 1 then the fewest likeliest that
    together have at least this probability; whatever ties with the last of them stays too. Each is one for all rows, or
    (B,).
    """
    V = logits.shape[-1]
    k, mass = torch.as_tensor(top_k), torch.as_tensor(top_p, dtype=torch.float64)
    temperatures = torch.as_tensor(temperature, dtype=torch.float64, device=logits.device).expand(len(logits))
    below = logits.double() - logits.amax(-1, keepdim=True)  # the likeliest is 0, whatever it is divided by
    p = (below / torch.where(temperatures > 0, temperatures, 1)[:, None]).softmax(-1)  # (B, V)
    if (k > 0).any() or (mass < 1).any():
        p = p * (p >= _least_kept(p, k.to(p.device), mass.to(p.device)))
    cumulative = p.cumsum(-1)
    target = u[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_max(V - 1)
    return torch.where(temperatures > 0, drawn, logits.argmax(-1))


def _least_kept(p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The probability of the last colour that top_k and then top_p leave: (B, V) -> (B, 1); 0 where neither is set."""
    V = p.shape[-1]
    top_k, top_p = (x.expand(len(p))[:, None] for x in (top_k, top_p))
    ordered = p.sort(-1, descending=True).values
    kth = ordered.gather(-1, torch.where(top_k > 0, top_k.clamp_max(V), V) - 1)
    kth = torch.where(top_k > 0, kth, 0)
    mass = (ordered * (ordered >= kth)).cumsum(-1)
    needed = F.pad(mass[:, :-1], (1, 0)) < top_p * mass[:, -1:]  # the likelier ones are not enough
    last = ordered.gather(-1, needed.sum(-1, keepdim=True) - 1)
    return torch.where(top_p < 1, torch.maximum(last, kth), kth)


def figure(palette: Palette, originals: Tokens, completions: Tokens, rows: int) -> RGB:
    """One row a picture: the given part, its completions, the quantised original. (N, T), (N, n, T) -> (H, W, 3)."""
    n_px = int(originals.shape[1] ** 0.5)
    drawn = []
    for original, finished in zip(originals, completions, strict=True):
        whole = palette.decode(original).reshape(n_px, n_px, 3)
        given = whole.copy()
        given[rows:] = 128  # what is not given is grey
        drawn.append([given, *palette.decode(finished).reshape(-1, n_px, n_px, 3), whole])
    return images.sheet(drawn, scale=max(1, TILE // n_px), wide_gaps=(1, 1 + completions.shape[1]))
