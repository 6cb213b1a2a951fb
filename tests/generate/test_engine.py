"""The engine: a sample depends on its request and its seed alone, and requests are served in order."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from igpt_ray.errors import SettingError
from igpt_ray.generate import completion
from igpt_ray.generate.engine import Engine, Generation, Request
from igpt_ray.generate.quantize import Precision
from igpt_ray.model.image_gpt import ImageGPT

MODEL = random_model(std=0.4)
"""Sharp enough that samples depend on what was given, soft enough that they differ."""
PICTURES = random_tokens(MODEL, 8).numpy()
TOP_ROWS = np.arange(16) < 8


def drained(engine: Engine) -> list[Generation]:
    done = []
    while engine.slots_in_use or engine.waiting:
        done += engine.step()
    return done


def alone(request: Request, model: ImageGPT = MODEL) -> NDArray[np.integer]:
    """Samples of `completion.complete`, one seed at a time: (n, T)."""
    tokens, mask = torch.from_numpy(request.tokens)[None], torch.from_numpy(request.prompt_mask)[None]
    how = request.temperature, request.top_k, request.top_p
    return np.concatenate(
        [completion.complete(model, tokens, 1, [seed], *how, prompt_mask=mask).numpy() for seed in request.seeds]
    )


# ------------------------------------------------------------------------------------------------ the same samples

masks = st.one_of(
    st.integers(0, 16).map(lambda n: np.arange(16) < n),
    st.lists(st.booleans(), min_size=16, max_size=16).map(lambda bits: np.array(bits, bool)),
)
requests = st.builds(
    Request,
    tokens=st.integers(0, 7).map(lambda i: PICTURES[i]),
    prompt_mask=masks,
    seeds=st.lists(st.integers(0, 2**64), min_size=1, max_size=4).map(tuple),
    temperature=st.sampled_from([0, 0.5, 1, 1, 3]),
    top_k=st.sampled_from([0, 0, 1, 5]),
    top_p=st.sampled_from([1, 1, 0.5, 0.9]),
)
happenings = st.lists(st.one_of(requests, st.integers(1, 6), st.just("cancel")), min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(4, 9),
    happenings=happenings,
    choice=st.randoms(use_true_random=False),
    device_loop=st.booleans(),
)
def test_a_sample_does_not_depend_on_other_requests(
    slots: int, happenings: list[Any], choice: Any, device_loop: bool
) -> None:
    """Requests, steps and cancellations are in random order. A slot must not keep earlier state or be lost, and kernels
    must not sum in another order for another number of rows. The device loop, here without CUDA, gives the same
    samples."""
    engine, tickets = Engine(MODEL, slots, device_loop=device_loop), list[Generation]()
    finished = []
    for what in happenings:
        if isinstance(what, Request):
            tickets.append(engine.submit(what))
        elif isinstance(what, int):
            finished += [ticket for _ in range(what) for ticket in engine.step()]
        elif tickets:
            engine.cancel(choice.choice(tickets))
    finished += drained(engine)
    for ticket in tickets:
        assert ticket.finished != ticket.cancelled
        assert ticket.finished == (ticket in finished or bool(ticket.request.prompt_mask.all()))
        if ticket.finished:
            assert ticket.position == 16
            assert (ticket.tokens == alone(ticket.request)).all()
    assert engine.slots_in_use == engine.waiting == 0
    assert engine.step() == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_sample_is_the_same_alone_and_among_31_others(precision: Precision) -> None:
    """The width is one at which libraries choose between kernels."""
    model = random_model(std=0.06, n_layer=2, n_embd=256, n_px=6, n_vocab=64)
    pictures = random_tokens(model, 16).numpy()
    requests_in_order = [Request(pictures[i], np.arange(36) < 2 * i, (100 + i, 200 + i)) for i in range(16)]
    crowd, single = Engine(model, 32, precision), Engine(model, 1, precision)
    together = [crowd.submit(request) for request in requests_in_order]
    drained(crowd)
    for ticket in together[::5]:
        for row, seed in enumerate(ticket.request.seeds):
            one = single.submit(replace(ticket.request, seeds=(seed,)))
            drained(single)
            assert (one.tokens[0] == ticket.tokens[row]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the recorded device loop is not tested")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shape", [{}, {"qk_norm": True, "rotary": True}, {"n_embd": 192, "n_head": 2}])
def test_the_recorded_device_loop_gives_the_cpu_s_samples(
    shape: dict[str, Any], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are at different positions, some are idle, and a slot is used again. Triton's kernels may overlap."""
    monkeypatch.setattr(pytest.importorskip("igpt_ray.generate.triton_kernels"), "OVERLAP_LAUNCHES", overlap)
    std = 0.1 if shape else 0.4
    requests_in_order = [
        Request(PICTURES[0], np.arange(16) < 5, (1, 2)),
        Request(PICTURES[1], np.arange(16) % 3 == 0, (3,), top_k=3),
        Request(PICTURES[2], np.zeros(16, bool), (4,), temperature=0),
        Request(PICTURES[3], TOP_ROWS, (5, 6), temperature=0.5, top_p=0.8),
    ]
    engines = Engine(random_model(std=std, **shape), 5), Engine(random_model(std=std, **shape).cuda(), 5)
    generations = [[engine.submit(request) for request in requests_in_order] for engine in engines]
    for engine in engines:
        drained(engine)
    for expected, found in zip(*generations, strict=True):
        assert (found.tokens == expected.tokens).all()


# ------------------------------------------------------------------------------------------------ on the way


def test_progress_can_be_read_between_steps(device: torch.device) -> None:
    """Pixels before `position` do not change, prompt pixels are set from the start, and a sample ends with its last
    generated pixel."""
    mask = np.array([1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1], bool)
    engine = Engine(random_model(std=0.4, device=device), 2, device_loop=False)
    ticket = engine.submit(Request(PICTURES[0], mask, (1, 2)))
    assert ticket.position == 2
    assert (ticket.tokens[:, mask] == PICTURES[0][mask]).all()
    seen = []
    while not ticket.finished:
        engine.step()
        seen.append((ticket.position, ticket.tokens.copy()))
    assert [position for position, _ in seen] == [3, 4, 5, 6, 7, 8, 16]
    for position, tokens in seen:
        assert (tokens[:, :position] == ticket.tokens[:, :position]).all()
    assert engine.generated == 8


def test_a_step_of_the_device_loop_ends_with_a_row_or_a_generation() -> None:
    """A row can be sent when it is complete, and a request can be admitted when another has finished."""
    engine = Engine(MODEL, 3, device_loop=True)
    mask = np.array([1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1], bool)
    first = engine.submit(Request(PICTURES[0], mask, (1, 2)))
    assert first.position == 2
    positions = []
    while not first.finished:
        engine.step()
        positions.append(first.position)
        assert (first.tokens[:, mask] == PICTURES[0][mask]).all()
    assert positions == [4, 8, 16]
    assert engine.generated == 2 * 5
    second = engine.submit(Request(PICTURES[1], np.arange(16) < 6, (3,), top_k=3))
    engine.step()
    third = engine.submit(Request(PICTURES[2], np.arange(16) < 3, (4,), top_p=0.5))
    seen = []
    while not (second.finished and third.finished):
        engine.step()
        seen.append((second.position, third.position))
    assert seen == [(9, 4), (12, 7), (13, 8), (16, 11), (16, 12), (16, 16)]
    for generation in (first, second, third):
        assert (generation.tokens == alone(generation.request)).all()


def test_a_request_without_pixels_to_generate_finishes_at_once() -> None:
    """It needs no slot."""
    engine = Engine(MODEL, 1)
    ticket = engine.submit(Request(PICTURES[0], np.ones(16, bool), (1,)))
    assert ticket.finished
    assert ticket.position == 16
    assert (ticket.tokens == PICTURES[0]).all()
    assert (engine.slots_in_use, engine.waiting, engine.generated, engine.step()) == (0, 0, 0, [])


def test_a_request_of_many_samples_is_not_overtaken() -> None:
    """Otherwise a stream of small requests could starve it."""
    engine = Engine(MODEL, 4)
    first = engine.submit(Request(PICTURES[0], TOP_ROWS, (1,)))
    engine.step()
    many = engine.submit(Request(PICTURES[1], TOP_ROWS, (1, 2, 3, 4)))
    late = engine.submit(Request(PICTURES[2], TOP_ROWS, (1,)))
    assert (engine.slots_in_use, engine.waiting) == (1, 2)
    assert drained(engine) == [first, many, late]


def test_the_slots_of_a_cancelled_request_are_free_in_the_next_step(device: torch.device) -> None:
    """Otherwise a disconnected client would occupy its slots to the end, or get new ones."""
    engine = Engine(random_model(std=0.4, device=device), 2, device_loop=False)
    gone, waiting, served = (engine.submit(Request(PICTURES[i], TOP_ROWS, (1, 2))) for i in range(3))
    engine.step()
    engine.cancel(gone)
    engine.cancel(waiting)
    assert (engine.slots_in_use, engine.waiting) == (0, 1)
    engine.step()
    assert served.position == 9
    assert gone.position == 9
    assert drained(engine) == [served]
    engine.cancel(served)
    assert (served.finished, served.cancelled) == (True, False)
    assert (gone.finished, gone.cancelled) == (False, True)


def test_requests_may_be_submitted_from_any_thread_during_steps() -> None:
    """No request is lost, and no slot is used twice."""
    engine = Engine(MODEL, 3)
    tickets: list[Generation] = []

    def ask(i: int) -> None:
        for k in range(10):
            ticket = engine.submit(Request(PICTURES[i], TOP_ROWS, (i, k)))
            tickets.append(ticket)
            if k % 3 == 2:
                engine.cancel(ticket)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    done = []
    while any(thread.is_alive() for thread in threads) or engine.waiting or engine.slots_in_use:
        done += engine.step()
    assert len(tickets) == 40
    assert set(done) == {ticket for ticket in tickets if ticket.finished}
    assert all(ticket.finished != ticket.cancelled for ticket in tickets)
    for ticket in done[::7]:
        assert (ticket.tokens == alone(ticket.request)).all()


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": PICTURES[0][:15]}, r"tokens are \(15,\) and prompt_mask \(16,\), expected \(16,\) of both"),
        ({"prompt_mask": TOP_ROWS[None]}, r"prompt_mask \(1, 16\)"),
        ({"tokens": PICTURES[0] / 2}, "tokens are float64 and prompt_mask bool, expected integers and booleans"),
        ({"prompt_mask": TOP_ROWS.astype(int)}, "prompt_mask int64"),
        ({"tokens": PICTURES[0] + 16}, "a prompt pixel has the token .*, expected 0 to 15"),
        ({"tokens": PICTURES[0] - 16}, "a prompt pixel has the token -"),
        ({"seeds": ()}, "0 samples were requested, expected 1 to 2"),
        ({"seeds": (1, 2, 3)}, "3 samples were requested, expected 1 to 2: send several requests"),
        ({"seeds": (-1,)}, "a seed is -1"),
        ({"seeds": (2**128,)}, "a seed is 3402"),
        ({"seeds": (1.5,)}, "a seed is 1.5"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_a_malformed_request_is_an_error_at_submission(change: dict[str, Any], message: str) -> None:
    """An error inside a step would fail all other requests."""
    engine = Engine(MODEL, 2)
    good = Request(PICTURES[0], TOP_ROWS, (1,))
    with pytest.raises(SettingError, match=message):
        engine.submit(replace(good, **change))
    assert engine.waiting == 0
    ticket = engine.submit(
        replace(good, tokens=np.where(TOP_ROWS, PICTURES[0], 999))
    )  # what is not given may be anything
    assert drained(engine) == [ticket]


def test_extreme_settings_are_served(device: torch.device) -> None:
    """Logits must not overflow to NaN; top_k may exceed the number of colours."""
    model = random_model(std=0.4, device=device)
    engine = Engine(model, 4)
    tickets = [engine.submit(Request(PICTURES[0], TOP_ROWS, (1,), heat)) for heat in (5e-324, 1e-6, 1e6, 1e308)]
    drained(engine)
    coldest = alone(Request(PICTURES[0], TOP_ROWS, (1,), 0), model)
    assert (tickets[0].tokens == coldest).all()
    assert (tickets[1].tokens == coldest).all()
    assert all(ticket.tokens.max() < 16 for ticket in tickets)
    plain, huge = (engine.submit(Request(PICTURES[0], TOP_ROWS, (1,), top_k=k)) for k in (0, 10**30))
    drained(engine)
    assert (plain.tokens == huge.tokens).all()
