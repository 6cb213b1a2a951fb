"""Images that end, hang or exhaust their decoder, by the real faults of `tests/support/sitecustomize.py`."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import dying
import numpy as np
import pytest
from PIL import Image

from igpt_ray.data import pixels
from igpt_ray.data.decoding import DecoderProcess, decode, isolation
from igpt_ray.errors import ImageError

RGB = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
PNG = pixels.png(RGB)


@pytest.fixture(scope="module")
def process() -> Iterator[DecoderProcess]:
    process = DecoderProcess(seconds=2, memory=1 << 30)
    yield process
    process.close()


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.fromarray(RGB).resize((500, 375)).save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize("data", [PNG, jpeg()], ids=["png", "jpeg"])
@pytest.mark.parametrize("pipeline", list(pixels.PIPELINES))
def test_isolation_does_not_change_a_pixel(process: DecoderProcess, data: bytes, pipeline: str) -> None:
    isolated = process.call(pixels.random_view, data, 32, "key", 1, pipeline)
    np.testing.assert_array_equal(isolated, pixels.random_view(data, 32, "key", 1, pipeline))
    assert isolated.dtype == np.uint8


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"TEST-CRASH", "^the decoder crashes$"),
        (b"TEST-HANG", "^decoding takes more than 2 s$"),
        (b"TEST-MEMORY", "^decoding takes more than 1024 MiB of memory$"),
    ],
)
def test_an_image_that_ends_its_decoder_is_refused_and_the_next_one_is_read(
    process: DecoderProcess, tail: bytes, reason: str
) -> None:
    with pytest.raises(ImageError, match=reason):
        process.call(pixels.centre_view, PNG + tail, 8)
    np.testing.assert_array_equal(process.call(pixels.centre_view, PNG, 8), pixels.centre_view(PNG, 8))


def test_a_fork_that_dies_of_an_earlier_image_does_not_cost_a_later_one() -> None:
    process = DecoderProcess(calls=3)
    pids = [int(process.call(dying.lives_for, 2)) for _ in range(4)]
    assert len(set(pids)) == 2  # two calls, a death and a repetition, one more call
    pids = [int(process.call(dying.lives_for, 9)) for _ in range(4)]
    assert len(set(pids)) == 2  # one call that completes three of the fork, and three of the next
    with pytest.raises(ImageError, match="the decoder crashes"):
        process.call(dying.lives_for, 0)
    process.close()


def test_errors_of_the_decoder_keep_their_text_and_bugs_are_no_image_errors(process: DecoderProcess) -> None:
    with pytest.raises(ImageError) as isolated:
        process.call(pixels.centre_view, PNG[:-20], 8)
    with pytest.raises(ImageError) as direct:
        pixels.centre_view(PNG[:-20], 8)
    assert str(isolated.value) == str(direct.value)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*TypeError"):
        process.call(pixels.centre_view, PNG)


def test_a_decoder_process_that_is_killed_is_started_again(process: DecoderProcess) -> None:
    process._child.kill()
    process._child.wait()
    assert process.call(pixels.centre_view, PNG, 8).shape == (8, 8, 3)


def test_a_decoder_process_ends_with_its_parent() -> None:
    """A killed worker leaves no process behind: `run` waits for all that share the pipe of stderr."""
    code = """
import os
from igpt_ray.data import decoding, pixels
process = decoding.DecoderProcess()
process.call(decoding.sizes, [])
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGKILL, b"")


def test_decode_is_direct_unless_the_context_isolates_it() -> None:
    assert decode(os.getpid) == os.getpid()
    with isolation():
        assert decode(_pid) != os.getpid()
    assert decode(os.getpid) == os.getpid()


def _pid() -> object:
    return np.array(os.getpid())


def test_a_decoder_that_hangs_ends_a_process_with_a_time_limit() -> None:
    code = """
import time
from igpt_ray.data import decoding
decoding.SECONDS = 0.2
with decoding.time_limit():
    decoding.decode(time.sleep, 0.01)
time.sleep(0.5)
print("alive", flush=True)
with decoding.time_limit():
    decoding.decode(time.sleep, 60)
"""
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGALRM, b"alive\n")
