"""A preparation that is killed at every step of its writing, once at each, and repeated undisturbed.

    python tests/support/killed.py '{"source": ..., "palette": ..., "pixels": ..., ...}' <root>

For n = 0, 1, 2 ... a child process prepares into <root>/<n> and kills itself with SIGKILL right before its n-th step:
a temporary file of the store that is made, opened, renamed, linked or removed; in a bucket, bytes that leave for the
server to be written. Python's audit hooks announce these. The loop ends with the child that gets through. A JSON line
for each tells where it died, and what the store's files are after the death and after the repeat (local stores only).
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from igpt_ray import storage
from igpt_ray.data.config import PrepareConfig
from igpt_ray.data.mapper import serial_map
from igpt_ray.data.prepare import prepare

FILES = {"tempfile.mkstemp", "open", "os.rename", "os.link", "os.remove"}
SENT = "http.client.send"


def main(settings: dict[str, Any], root: str) -> None:
    n, killed = 0, True
    while killed:
        made = PrepareConfig.model_validate({**settings, "tokens": storage.join(root, str(n))})
        end, said = in_child(partial(doomed, made, n))
        killed = end == -signal.SIGKILL
        after = files_below(made.tokens)
        again, complaint = in_child(lambda _, made=made: prepare(made, serial_map))
        print(json.dumps([n, said, after, files_below(made.tokens), again, complaint]), flush=True)
        n += 1


def doomed(settings: PrepareConfig, n: int, writer: int) -> None:
    sys.addaudithook(Killer(settings.tokens, n, writer))
    prepare(settings, serial_map)


def in_child(work: Callable[[int], object]) -> tuple[int, str]:
    """The exit code of a process that does `work`, and what it wrote to the pipe it was handed, or why it failed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            work(writer)
            code = 0
        except BaseException as error:
            os.write(writer, repr(error).encode()[:500])
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


class Killer:
    def __init__(self, tokens: str, n: int, writer: int):
        self.tokens = tokens
        self.left = n
        self.writer = writer

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILES and (event != "open" or arguments[1] == "w"):
            paths = [str(a) for a in arguments if str(a).startswith(self.tokens + "/")]
            step = f"{event} {paths[0].removeprefix(self.tokens)}" if paths else ""
        else:
            sent = bytes(arguments[1][:60]) if event == SENT else b"GET"
            step = "" if sent.startswith((b"GET", b"HEAD")) else f"{event} {sent!r}"
        if step and not self.left:
            os.write(self.writer, step.encode())
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= bool(step)


def files_below(tokens: str) -> dict[str, str]:
    paths = Path(tokens).rglob("*") if not tokens.startswith("s3://") else []
    return {str(p.relative_to(tokens)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.is_file()}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
