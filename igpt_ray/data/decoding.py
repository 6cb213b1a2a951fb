"""Decode images so that a crash, a hang or exhausted memory of a decoder costs one image and not the process.

`decode` calls a function that decodes an image, in one of three ways that the caller's context selects:

* by default, directly;
* in `time_limit`, directly, but the kernel ends this process if the call exceeds `SECONDS`;
* in `isolation`, in a process of its own, whose end is an `ImageError`.

Work units are computed under the time limit, which costs a microsecond per image. A unit that ended its process is
computed again in isolation (`flows/actor_map.py`). The server isolates every image (`serve/decoder_pool.py`).
"""

import io
import logging
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from igpt_ray.data import image_files
from igpt_ray.data import pixels as pixels  # the child process must import it before its first fork
from igpt_ray.errors import ImageError

log = logging.getLogger(__name__)

SECONDS = 60.0
"""Time limit of an image."""
MEMORY = 2 << 30
"""Memory that an isolated call may allocate, in bytes."""
STARTS = 3
"""Attempts of a call whose child process is killed from outside."""
ARRAY, REFUSAL, BUG = b"A", b"R", b"B"
"""First byte of a reply: an array as .npy, the text of an `ImageError`, or a traceback."""
LENGTH = struct.Struct(">Q")

Decoded = NDArray[Any]


def _directly(function: Callable[..., Decoded], *arguments: Any) -> Decoded:
    return function(*arguments)


_caller: ContextVar[Callable[..., Decoded]] = ContextVar("_caller", default=_directly)


def decode(function: Callable[..., Decoded], *arguments: Any) -> Decoded:
    """`function(*arguments)`, protected as the context requires. Raises `ImageError` for images that are refused."""
    return _caller.get()(function, *arguments)


@contextmanager
def time_limit() -> Iterator[None]:
    """Within the block, a call of `decode` that takes more than `SECONDS` ends this process with SIGALRM.

    Only the kernel can interrupt a decoder, which may hold the interpreter's lock.
    """

    def call(function: Callable[..., Decoded], *arguments: Any) -> Decoded:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            return function(*arguments)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    with _calling(call):
        yield


@contextmanager
def isolation() -> Iterator[None]:
    """Within the block, each call of `decode` runs in a process of its own."""
    process = DecoderProcess()
    try:
        with _calling(process.call):
            yield
    finally:
        process.close()


@contextmanager
def _calling(call: Callable[..., Decoded]) -> Iterator[None]:
    token = _caller.set(call)
    try:
        yield
    finally:
        _caller.reset(token)


def sizes(files: list[bytes]) -> NDArray[np.int64]:
    """(N, 2) width and height of encoded images, from their headers. Raises `ImageError` for other files."""
    headers = map(image_files.header_of, files)
    return np.array([(header.width, header.height) for header in headers], np.int64).reshape(-1, 2)


class DecoderProcess:
    """A child process that forks for every call, with limits of time and memory. Not safe for concurrent calls.

    A fork inherits the imported modules, so it starts in about a millisecond, and what an image does to the memory of
    its decoder ends with that image. Replies are not unpickled, because an image may have taken over its decoder.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY):
        self.seconds = seconds
        self.memory = memory
        self._child = self._start()

    def call(self, function: Callable[..., Decoded], *arguments: Any) -> Decoded:
        """`function(*arguments)`, computed in a fork. Function and arguments are pickled.

        Raises `ImageError` if the function does, or if the call crashes or exceeds a limit.
        """
        request = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)
        for _ in range(STARTS):
            try:
                _send(self._child.stdin, request)
                reply = _receive(self._child.stdout)
                break
            except (EOFError, BrokenPipeError):
                self.close()
                self._child = self._start()
        else:
            raise RuntimeError(f"the decoder process was killed {STARTS} times: is the machine out of memory?")
        kind, content = reply[:1], reply[1:]
        if kind == ARRAY:
            return np.load(io.BytesIO(content), allow_pickle=False)
        text = content.decode("utf-8", "replace")
        raise ImageError(text) if kind == REFUSAL else RuntimeError(text)

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            pipe.close()

    def _start(self) -> Any:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(self.seconds), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **threads},
            bufsize=0,
        )


# ------------------------------------------------------------------------------------------------ the child process


def main(seconds: float, memory: int) -> None:
    """Read a request from stdin, fork, and write the reply to stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and closes stdin when it ends
    requests, replies = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between replies
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            request = _receive(requests)
        except EOFError:
            return
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            for file in (requests, replies):
                os.close(file.fileno())
            _compute(request, writer, seconds, memory)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            reply = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        _send(replies, reply if code == 0 else REFUSAL + _reason(code, seconds).encode())


def _compute(request: bytes, writer: int, seconds: float, memory: int) -> None:
    """Write the reply to a request, and end this process."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # out of memory, the kernel ends this process first
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        function, arguments = pickle.loads(request)
        out = io.BytesIO()
        np.save(out, function(*arguments), allow_pickle=False)
        reply = ARRAY + out.getvalue()
    except ImageError as error:
        reply = REFUSAL + str(error).encode("utf-8", "backslashreplace")
    except MemoryError:
        reply = REFUSAL + f"decoding takes more than {memory >> 20} MiB of memory".encode()
    except Exception:
        reply = BUG + traceback.format_exc().encode("utf-8", "backslashreplace")
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(reply)
    os._exit(0)


def _reason(code: int, seconds: float) -> str:
    """Why a fork ended without a reply. The signal of a crash is only logged: it can differ from run to run."""
    if code == -signal.SIGALRM:
        return f"decoding takes more than {seconds:g} s"
    print(f"a decoder ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}", file=sys.stderr)
    return "the decoder crashes"


def _send(pipe: BinaryIO, message: bytes) -> None:
    for part in (LENGTH.pack(len(message)), message):
        view = memoryview(part)
        while view:  # an unbuffered pipe may take a part
            view = view[pipe.write(view) :]
    pipe.flush()


def _receive(pipe: BinaryIO) -> bytes:
    (length,) = LENGTH.unpack(_exactly(pipe, LENGTH.size))
    return _exactly(pipe, length)


def _exactly(pipe: BinaryIO, n: int) -> bytes:
    parts = []
    while n:
        parts.append(pipe.read(min(n, 1 << 20)))
        if not parts[-1]:
            raise EOFError
        n -= len(parts[-1])
    return b"".join(parts)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
