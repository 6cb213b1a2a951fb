"""Decode images so that a crash, a hang or exhausted memory of a decoder costs one image and not the process.

`decode` calls a function that decodes an image, in one of three ways that the caller's context selects:

* by default, directly;
* in `time_limit`, directly, but the kernel ends this process if the call exceeds `SECONDS`;
* in `isolation`, in a process of its own, whose end is an `ImageError`.

Work units are computed under the time limit, which costs a microsecond per image. A unit that ended its process is
computed again in isolation (`flows/actor_map.py`). The server isolates every image (`serve/decoder_pool.py`).
"""

import io
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from igpt_ray.data import image_files
from igpt_ray.data import pixels as pixels  # the child process must import it before its first fork
from igpt_ray.errors import ImageError

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
    """A child process that calls functions in forks of itself, with limits of time and memory per call.

    A fork inherits the imported modules. It serves `calls` calls: with one, what an image does to the memory of its
    decoder ends with that image; with more, forks (1 to 15 ms) cost less. If an older fork dies, a new one repeats the
    call, because an earlier image may be the cause. Replies are not unpickled, because an image may have taken over its
    decoder. Not safe for concurrent calls.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY, calls: int = 1):
        self.limits = seconds, memory, calls
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
            [sys.executable, "-P", "-m", __name__, *map(str, self.limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **threads},
            bufsize=0,
        )


# ------------------------------------------------------------------------------------------------ the child process


def main(seconds: float, memory: int, calls: int) -> None:
    """Read requests from stdin, have a fork answer them, and write its replies to stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and closes stdin when it ends
    requests, replies = os.fdopen(0, "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # what a library prints must not get between replies
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fork: _Fork | None = None
    with suppress(EOFError, BrokenPipeError):
        while True:
            request, reply = _receive(requests), None
            while reply is None:
                fresh, fork = fork is None, fork or _Fork(seconds, memory, (requests, replies))
                reply = fork.reply(request)
                if reply is None:
                    code, fork = fork.exit_code(), None
                    if fresh or code == -signal.SIGALRM:
                        reply = REFUSAL + _reason(code, seconds).encode()
            _send(replies, reply)
            if fork is not None and fork.n_calls == calls:
                fork.exit_code()
                fork = None


class _Fork:
    """A fork of this process that computes replies. It closes its copies of the files `foreign`."""

    def __init__(self, seconds: float, memory: int, foreign: tuple[BinaryIO, ...]):
        self.n_calls = 0
        (theirs, requests), (replies, answers) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for file in (requests, replies, *(file.fileno() for file in foreign)):
                    os.close(file)
                _serve(os.fdopen(theirs, "rb", 0), os.fdopen(answers, "wb", 0), seconds, memory)
            finally:
                os._exit(0)
        os.close(theirs)
        os.close(answers)
        self.requests, self.replies = os.fdopen(requests, "wb", 0), os.fdopen(replies, "rb", 0)

    def reply(self, request: bytes) -> bytes | None:
        """The reply; None if the fork dies."""
        self.n_calls += 1
        try:
            _send(self.requests, request)
            return _receive(self.replies)
        except (EOFError, BrokenPipeError):
            return None

    def exit_code(self) -> int:
        """Let the fork end. Returns its exit code, or minus the signal that ended it."""
        self.requests.close()
        self.replies.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _serve(requests: BinaryIO, replies: BinaryIO, seconds: float, memory: int) -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")  # out of memory, the kernel ends this process first
    while True:
        request = _receive(requests)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        reply = _computed(request, memory)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply)


def _computed(request: bytes, memory: int) -> bytes:
    try:
        function, arguments = pickle.loads(request)
        out = io.BytesIO()
        np.save(out, function(*arguments), allow_pickle=False)
        return ARRAY + out.getvalue()
    except ImageError as error:
        return REFUSAL + str(error).encode("utf-8", "backslashreplace")
    except MemoryError:
        return REFUSAL + f"decoding takes more than {memory >> 20} MiB of memory".encode()
    except Exception:
        return BUG + traceback.format_exc().encode("utf-8", "backslashreplace")


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
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
