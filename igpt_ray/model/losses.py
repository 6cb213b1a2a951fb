"""Objectives, as sums and counts: divided once, after every reduction.

B batch   T positions   V colours
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.rng import seed_of, uniforms

MASKED = 0.15
"""Share of positions that are masked (paper, section 2.1)."""
MASKS = 5
"""Masks of each image when a masked network is judged (paper, section 4.6)."""


def next_pixel(logits: Tensor, tokens: Tensor) -> Tensor:
    """Nats of every token: (B, T, V), (B, T) -> (B, T), in float32. The first pixel counts [OpenAI's `model`]."""
    B, T, V = logits.shape
    return F.cross_entropy(logits.float().view(B * T, V), tokens.view(B * T), reduction="none").view(B, T)


def masked_pixel(logits: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
    """Nats per masked token of every image: (B, T, V), (B, T), (B, T) -> (B,), in float32.

    The objective is the mean of these over images: an image counts the same however many positions it has masked
    [OpenAI's `model`].
    """
    masked = ~keep
    return (next_pixel(logits, tokens) * masked).sum(1) / masked.sum(1)


def sample_masks(seeds: list[int], n_positions: int) -> Tensor:
    """A mask for each seed, False where masked: (len(seeds), T) bool.

    A position is masked with probability MASKED. If none is, which is common only in pictures of a few pixels, the one
    that came nearest to it is: the mean over no position at all would not be a number.
    """
    u = uniforms(seeds, n_positions)
    return u > u.amin(1, keepdim=True).clamp_min(MASKED)


def keep_of_keys(keys: list[str], mask: int, n_positions: int) -> Tensor:
    """The masks under which images are judged, a function of their keys: (len(keys), T) bool. `mask` < MASKS."""
    return sample_masks([seed_of("mask", key, mask) for key in keys], n_positions)


def generative(model: ImageGPT, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
    """The sum of which the model's own objective is the mean: over tokens, or over images if masked by `keep`."""
    if keep is None:
        return next_pixel(model(tokens), tokens).sum()
    return masked_pixel(model(tokens, keep), tokens, keep).sum()


def forward_with_classifier(model: ImageGPT, tokens: Tensor, labels: Tensor, keep: Tensor | None = None) -> Tensor:
    """The fine-tuning loss of every image, generative + classification, 1:1 (paper, section 2.3): (B, T), (B,) -> (B,).

    In nats: the mean over the image's (masked) tokens, and of its label.
    """
    return joint_parts(model, tokens, labels, keep)[0]


def joint_parts(model: ImageGPT, tokens: Tensor, labels: Tensor, keep: Tensor | None = None) -> Tensor:
    """That loss, the generative part of it, and whether the head is right, of every image: (3, B)."""
    logits, classes = model.forward_with_classifier(tokens, keep)
    nats = next_pixel(logits, tokens).mean(1) if keep is None else masked_pixel(logits, tokens, keep)
    return torch.stack([nats + classification(classes, labels), nats, classes.argmax(1) == labels])


def classification(logits: Tensor, labels: Tensor) -> Tensor:
    """Nats of every label: (B, classes), (B,) -> (B,), in float32."""
    return F.cross_entropy(logits.float(), labels, reduction="none")
