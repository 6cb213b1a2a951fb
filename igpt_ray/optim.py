"""The optimiser and its schedule, as a pure function of the step."""

import math

from torch import nn
from torch.optim import Adam, Optimizer

from igpt_ray import config


def build(model: nn.Module, optim: config.Optim) -> Optimizer:
    return Adam(model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps)


def lr_at(step: int, optim: config.Optim) -> float:
    """Learning rate of step 0 .. steps-1: linear warm-up to the peak, then cosine to zero (paper, section 3.3)."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
