"""A preparation that is killed before each of its writes in turn, and then repeated.

    python tests/support/killed.py '{"source": ..., "palette": ..., "pixels": ..., ...}' <root>

For n = 0, 1, 2 ... a child process prepares into <root>/<n> and kills itself with SIGKILL right before its n-th write:
the creation, opening, renaming, linking or removal of a file of the store (reported by audit hooks), or for a bucket
before or after a request that changes it. The loop ends with the first child that completes. For each child a JSON line
has the event before which it died, and the store's files after the death and after the repeat (local stores only).
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

import obstore

from igpt_ray import storage
from igpt_ray.data.config import PrepareConfig
from igpt_ray.data.mapper import serial_map
from igpt_ray.data.prepare import prepare

FILES = {"tempfile.mkstemp", "open", "os.rename", "os.link", "os.remove"}
REQUESTS = ("put", "delete")
"""Functions of obstore that change a bucket."""


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
    killer = Killer(settings.tokens, n, writer)
    sys.addaudithook(killer)
    if storage.is_remote(settings.tokens):
        killer.intercept_requests()
    prepare(settings, serial_map)


def in_child(work: Callable[[int], object]) -> tuple[int, str]:
    """Run `work` in a child process; returns its exit code, and what it wrote to its pipe or why it failed."""
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
            if paths:
                self.step(f"{event} {paths[0].removeprefix(self.tokens)}")

    def step(self, name: str) -> None:
        if not self.left:
            os.write(self.writer, name.encode())
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def intercept_requests(self) -> None:
        for name in REQUESTS:
            setattr(obstore, name, partial(self.request, name, getattr(obstore, name)))

    def request(
        self, name: str, send: Callable[..., object], bucket: object, key: str, *words: Any, **more: Any
    ) -> object:
        self.step(f"{name} {key}")
        answer = send(bucket, key, *words, **more)
        self.step(f"return from {name} {key}")
        return answer


def files_below(tokens: str) -> dict[str, str]:
    paths = Path(tokens).rglob("*") if not tokens.startswith("s3://") else []
    return {str(p.relative_to(tokens)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.is_file()}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
