"""Images of requests that crash, hang or overload their decoders harm nobody but their sender.

The faults are real: see `tests/support/sitecustomize.py`, which the decoder processes run.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from dying import hanging_view, slow_view
from serving import Place, base64_of, picture, serving, tiny_release, until

from igpt_ray import weights
from igpt_ray.data import pixels
from igpt_ray.errors import ImageError
from igpt_ray.evaluate.likelihood import image_nats
from igpt_ray.serve import api, decoder_pool
from igpt_ray.serve.decoder_pool import DecoderPool, Overloaded

BYSTANDERS = 100


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_release(str(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def place(release: str) -> Iterator[Place]:
    """A server whose decoders may take a few seconds for an image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_pool, "SECONDS", 4.0)
        with serving({"tiny": release}) as place:
            yield place


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    pool = DecoderPool(1)
    yield pool
    pool.close()


def score(place: Place, *files: bytes) -> tuple[int, object]:
    answer = place.ask("/v1/score", {"image": [base64_of(file) for file in files]})
    return answer.status, answer.code if answer.code else [one["nats"] for one in answer.body["data"]]


@pytest.mark.parametrize("fault", [b"TEST-CRASH", b"TEST-MEMORY", b"TEST-HANG"])
def test_an_image_that_ends_its_decoder_harms_only_its_sender(place: Place, release: str, fault: bytes) -> None:
    loaded = weights.load_release(release)
    files = [picture(i) for i in range(BYSTANDERS)]
    tokens = np.stack([loaded.palette.encode(pixels.centre_view(file, 8)).reshape(-1) for file in files])
    with ThreadPoolExecutor(16) as threads:
        killers = [threads.submit(score, place, picture(0) + fault) for _ in range(4)]
        answers = list(threads.map(partial(score, place), files))
    assert {killer.result() for killer in killers} == {(400, "invalid_image")}
    assert {status for status, _ in answers} == {200}
    np.testing.assert_allclose([nats[0] for _, nats in answers], image_nats(loaded.model, tokens, 16), rtol=1e-5)


def test_a_mask_that_ends_its_decoder_is_an_error(place: Place) -> None:
    body = {"image": base64_of(picture()), "mask": base64_of(picture() + b"TEST-CRASH")}
    assert place.ask("/v1/completions", body).code == "invalid_image"


def test_the_pixels_of_a_request_have_a_limit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_pool, "MAX_SUM", 3 * 40 * 40)
    assert score(place, *[picture()] * 3)[0] == 200
    answer = place.ask("/v1/score", {"image": [base64_of(picture())] * 4})
    assert (answer.status, answer.code) == (400, "invalid_image")
    assert "the 4 images have 6400 pixels, expected at most 4800 in a request" in answer.body["error"]["message"]


def test_beyond_the_pixels_that_may_wait_a_request_is_turned_away(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_pool, "SMALL", 40 * 40 - 1)
    monkeypatch.setattr(decoder_pool, "MAX_WAITING", 40 * 40)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(score, place, picture() + b"TEST-SLOW")
        answers = []
        while not slow.done():
            answers.append(place.ask("/v1/score", {"image": base64_of(picture())}))
    refused = [answer for answer in answers if answer.status != 200]
    assert {answer.code for answer in refused} == {"overloaded"}
    assert all("retry-after" in answer.headers for answer in refused)
    assert slow.result()[0] == score(place, picture())[0] == 200


def test_the_time_limit_of_a_request_includes_its_decoding(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "REQUEST_SECONDS", 0.2)
    answer = place.ask("/v1/completions", {"image": base64_of(picture() + b"TEST-SLOW")})
    assert (answer.status, answer.code) == (504, "timeout")


def test_an_image_larger_than_the_limits_is_refused(pool: DecoderPool) -> None:
    for height, width in ((4096, 4097), (1, decoder_pool.MAX_SIDE + 1)):
        with pytest.raises(ImageError, match=f"{width} x {height} pixels, expected at most"):
            asyncio.run(pool.decode([pixels.png(np.zeros((height, width, 3), np.uint8))], pixels.centre_view, 8))


def test_a_request_that_is_cancelled_leaves_the_queue(pool: DecoderPool, tmp_path: Path) -> None:
    files = [picture() + bytes([i]) for i in range(50)]

    async def leave() -> None:
        many = asyncio.ensure_future(pool.decode(files, slow_view, str(tmp_path)))
        await asyncio.to_thread(until, lambda: list(tmp_path.iterdir()))
        many.cancel()
        await asyncio.wait([many])
        await pool.decode([picture()], pixels.centre_view, 8)

    asyncio.run(leave())
    assert len(list(tmp_path.iterdir())) < 50
    assert pool.waiting == 0


def test_a_request_with_many_images_delays_another_one_by_one_image(pool: DecoderPool, tmp_path: Path) -> None:
    files = [picture() + bytes([i]) for i in range(50)]

    async def both() -> int:
        many = asyncio.ensure_future(pool.decode(files, slow_view, str(tmp_path)))
        await asyncio.to_thread(until, lambda: list(tmp_path.iterdir()))
        await pool.decode([picture()], pixels.centre_view, 8)
        n_decoded = len(list(tmp_path.iterdir()))
        assert (await many).shape == (50, 1, 1, 3)
        return n_decoded

    assert asyncio.run(both()) < 50


def test_a_small_image_does_not_wait_for_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both processes would be occupied by images that hang, of clients that disconnect."""
    monkeypatch.setattr(decoder_pool, "SMALL", 40 * 40 - 1)
    monkeypatch.setattr(decoder_pool, "SECONDS", 5.0)
    pool = DecoderPool(2)

    async def three() -> list[bool]:
        hangs = [pool.decode([picture()], hanging_view) for _ in range(3)]
        tasks = [asyncio.ensure_future(hang) for hang in hangs]
        await asyncio.to_thread(until, lambda: pool.waiting == 3 * 40 * 40)
        tasks[0].cancel()
        await pool.decode([picture(n=20)], pixels.centre_view, 8)
        done = [task.done() for task in tasks[1:]]
        await asyncio.wait(tasks)
        return done

    assert asyncio.run(three()) == [False, False]
    pool.close()


def test_requests_are_admitted_while_few_pixels_wait(
    pool: DecoderPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request counts with its largest image, because it waits for one image at a time."""
    monkeypatch.setattr(decoder_pool, "SMALL", 40 * 40 - 1)
    monkeypatch.setattr(decoder_pool, "MAX_WAITING", 2 * 40 * 40)

    async def three() -> list[object]:
        calls = [pool.decode([picture()] * 3, slow_view, str(tmp_path)) for _ in range(3)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(three())
    assert [isinstance(answer, Overloaded) for answer in answers] == [False, False, True]
