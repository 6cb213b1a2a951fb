"""The engine: a sample depends on its request and its seed alone, whatever is painted beside it."""

import numpy as np
import pytest
import torch
from conftest import random_model, random_tokens

from igpt_ray import sampling
from igpt_ray.engine import Engine, Request, Ticket
from igpt_ray.model import ImageGPT


@pytest.fixture(scope="module")
def model() -> ImageGPT:
    """Sharp enough that samples depend on what was given, soft enough that they differ."""
    return random_model(std=0.4)


def rows(model: ImageGPT, n: int, seeds: tuple[int, ...], picture: int = 0) -> Request:
    """The first n pixels of a random picture given."""
    tokens = random_tokens(model, picture + 1)[picture].numpy()
    return Request(tokens, np.arange(len(tokens)) < n, seeds)


def drained(engine: Engine) -> list[Ticket]:
    done = []
    while engine.lanes_in_use or engine.waiting:
        done += engine.step()
    return done


def test_samples_are_those_of_a_completion_alone(model: ImageGPT) -> None:
    """Keys written into a neighbour's lane, a position off by one, a prefill that one sample lacks."""
    engine = Engine(model, 4)
    tickets = [engine.submit(rows(model, 3 * i, tuple(range(9 * i, 9 * i + 1 + i % 3)), i)) for i in range(5)]
    assert set(drained(engine)) == set(tickets)
    for ticket in tickets:
        n, seeds = int(ticket.request.given.sum()), list(ticket.request.seeds)
        given = torch.from_numpy(ticket.request.tokens[None, :n])
        assert torch.equal(
            torch.from_numpy(ticket.tokens.astype(np.int64)), sampling.complete(model, given, len(seeds), seeds)
        )
