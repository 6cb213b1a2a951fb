"""Compiled blocks equal eager blocks, in one graph."""

from typing import Any

import pytest
import torch
from conftest import random_model, random_tokens

from igpt_ray.model import losses

MODELS: list[dict[str, Any]] = [{}, {"qk_norm": True, "rotary": True}, {"objective": "masked"}]


@pytest.mark.slow
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_a_compiled_network_equals_the_eager_network(options: dict[str, Any]) -> None:
    """Outputs and gradients. A break of the graph is an error."""
    torch._dynamo.reset()
    model = random_model(**options).requires_grad_(True)
    x = random_tokens(model, 4)
    visible_mask = losses.sample_masks(list(range(4)), 16) if "objective" in options else None
    results = []
    for compiled in (False, True):
        if compiled:
            for block in model.blocks:
                block.forward = torch.compile(block.forward, fullgraph=True)
        model.zero_grad()
        nats = losses.generative(model, x, visible_mask)
        nats.backward()
        results.append((nats.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
