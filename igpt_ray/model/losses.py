"""Losses per token and per image. The caller sums them and divides once, after all reductions.

B batch   T positions   V colours
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.rng import seed_of, uniforms

MASKED = 0.15
"""Probability that a position is masked (paper, section 2.1)."""
MASKS = 5
"""Masks per image in the evaluation of a masked model (paper, section 4.6)."""


def next_pixel(logits: Tensor, tokens: Tensor) -> Tensor:
    """Nats of every token: (B, T, V), (B, T) -> (B, T), in float32. Includes the first pixel (OpenAI's `model`)."""
    B, T, V = logits.shape
    return F.cross_entropy(logits.float().view(B * T, V), tokens.view(B * T), reduction="none").view(B, T)


def masked_pixel(logits: Tensor, tokens: Tensor, visible_mask: Tensor) -> Tensor:
    """Nats per masked token of every image: (B, T, V), (B, T), (B, T) -> (B,), in float32.

    The objective is their mean over images, so the number of masked positions does not weight an image (OpenAI's
    `model`).
    """
    masked = ~visible_mask
    return (next_pixel(logits, tokens) * masked).sum(1) / masked.sum(1)


def sample_masks(seeds: list[int], n_positions: int) -> Tensor:
    """One mask per seed, False where masked: (len(seeds), T) bool.

    A position is masked with probability MASKED. If no position is, which is likely only in images of a few pixels, the
    one with the smallest random number is masked, so that the mean is defined.
    """
    u = uniforms(seeds, n_positions)
    return u > u.amin(1, keepdim=True).clamp_min(MASKED)


def visible_masks_of_keys(keys: list[str], mask: int, n_positions: int) -> Tensor:
    """Masks number `mask` < MASKS for the evaluation of images, a function of their keys: (len(keys), T) bool."""
    return sample_masks([seed_of("mask", key, mask) for key in keys], n_positions)


def generative(model: ImageGPT, tokens: Tensor, visible_mask: Tensor | None = None) -> Tensor:
    """Sum of the model's loss: over tokens, or over images with `visible_mask`."""
    if visible_mask is None:
        return next_pixel(model(tokens), tokens).sum()
    return masked_pixel(model(tokens, visible_mask), tokens, visible_mask).sum()


def loss_parts(model: ImageGPT, tokens: Tensor, labels: Tensor, visible_mask: Tensor | None = None) -> Tensor:
    """Fine-tuning loss of every image in nats, generative + classification (paper, section 2.3); its generative part,
    the mean over the image's (masked) tokens; and 1 if the predicted class is right: (B, T), (B,) -> (3, B)."""
    logits, classes = model.forward_with_classifier(tokens, visible_mask)
    nats = next_pixel(logits, tokens).mean(1) if visible_mask is None else masked_pixel(logits, tokens, visible_mask)
    return torch.stack([nats + classification(classes, labels), nats, classes.argmax(1) == labels])


def classification(logits: Tensor, labels: Tensor) -> Tensor:
    """Nats of every label: (B, classes), (B,) -> (B,), in float32."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


# ------------------------------------------------------------------------------------------------ sums of a batch


def sum_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of the means that the sums of `MicroBatch.loss_sums` become; the first is the loss."""
    return ("loss", "nats_per_token", "accuracy") if config.n_class else ("nats_per_token",)


def loss_units_per_image(config: ModelConfig) -> int:
    """Divisor per image: its tokens where the loss is a mean over tokens, 1 where it is a mean over images."""
    return 1 if config.objective == "masked" or config.n_class else config.n_positions
