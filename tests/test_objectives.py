"""Objectives: sums and counts that no cutting of a batch can change."""

import math

import torch
from conftest import random_model, random_tokens

from igpt_ray import objectives


def test_nats_are_the_negative_logarithms_of_the_softmax() -> None:
    """Bits, a mean taken too early, or the probability of the neighbouring pixel."""
    model = random_model()
    x = random_tokens(model, 3)
    logits = model(x)
    nats = objectives.next_pixel(logits, x)
    assert nats.shape == x.shape
    for b, t in ((0, 0), (1, 7), (2, 15)):
        p = torch.softmax(logits[b, t].double(), 0)[x[b, t]]
        assert math.isclose(nats[b, t].item(), -math.log(p), rel_tol=1e-5)


def test_nats_are_float32_also_from_bfloat16_logits() -> None:
    """Eight bits of mantissa lose the third digit of a loss that is compared in the fourth."""
    logits, x = torch.randn(2, 5, 64), torch.randint(64, (2, 5))
    nats = objectives.next_pixel(logits.bfloat16(), x)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, objectives.next_pixel(logits.bfloat16().float(), x))


def test_micro_batches_add_up_to_the_batch() -> None:
    """A mean of means, where the last micro-batch is smaller: the loss and its gradient would depend on the cut."""
    model = random_model().requires_grad_(True)
    x = random_tokens(model, 5)
    gradients = []
    for cut in ([5], [2, 2, 1]):
        model.zero_grad()
        for part in x.split(cut):
            (objectives.next_pixel(model(part), part).sum() / x.numel()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
