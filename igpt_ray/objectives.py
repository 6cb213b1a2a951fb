"""Objectives, as sums and counts: divided once, after every reduction."""

import torch.nn.functional as F
from torch import Tensor


def next_pixel(logits: Tensor, tokens: Tensor) -> Tensor:
    """Nats of every token: (B, T, V), (B, T) -> (B, T), in float32. The first pixel counts [OpenAI's `model`]."""
    B, T, V = logits.shape
    return F.cross_entropy(logits.float().view(B * T, V), tokens.view(B * T), reduction="none").view(B, T)
