"""Sampling of tokens by inverting their cumulative distribution.

Every sample has its own stream of uniform random numbers, a function of its seed and the position. A sample therefore
depends neither on the rest of the batch nor on the length of the prompt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    k, mass = torch.as_tensor(top_k), torch.as_tensor(top_p, dtype=torch.float64)
    temperatures = torch.as_tensor(temperature, dtype=torch.float64, device=logits.device).expand(len(logits))
    filtered = bool((k > 0).any() or (mass < 1).any())
    return sample(logits, u, temperatures, (k.to(logits.device), mass.to(logits.device)) if filtered else None)


def sample(logits: Tensor, u: Tensor, temperatures: Tensor, kept: tuple[Tensor, Tensor] | None) -> Tensor:
    """`sample_inverse_cdf` with all settings on the device of the logits: no operation waits for the host.

    `temperatures` (B,) are float64, and `kept` is top_k and top_p, or None where no sample uses them.
    """
    below = logits.double() - logits.amax(-1, keepdim=True)  # at most 0, so that a small temperature cannot overflow
    p = (below / torch.where(temperatures > 0, temperatures, 1)[:, None]).softmax(-1)  # (B, V)
    if kept is not None:
        p = p * (p >= _least_kept(p, *kept))
    cumulative = p.cumsum(-1)
    target = u[:, None] * cumulative[:, -1:]
    sampled = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
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
