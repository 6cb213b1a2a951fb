"""Ctrl-C and SIGTERM end every command in the same way: one line on stderr and the shell's exit code for the signal."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised in the main thread like Ctrl-C."""


def catch_sigterm() -> None:
    """Raise `Terminated` on SIGTERM. Called again after ray.init(), which installs a handler of its own."""

    def handler(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def exits_on_interrupt() -> Iterator[None]:
    """End the program with exit code 130 after Ctrl-C and 143 after SIGTERM, with one line on stderr."""
    catch_sigterm()
    try:
        yield
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        print(*(["terminated" if terminated else "interrupted", *map(str, interrupt.args)]), sep=": ", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))


def run_interruptible(
    task: Callable[[], T], request_stop: Callable[[], bool], every_second: Callable[[], None] = lambda: None
) -> tuple[T, KeyboardInterrupt | None]:
    """Run `task` in a thread. Ctrl-C or SIGTERM calls `request_stop`; if that returns True, wait for the task to end.

    Meanwhile the main thread calls `every_second`, for example to draw a progress bar.

    Returns the task's result, and the interrupt if there was one. A second interrupt, or the first one when
    `request_stop` returns False, is raised at once. The thread is a daemon, so that it does not delay the exit.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    finished = threading.Event()

    def run() -> None:
        try:
            results.append(task())
        except BaseException as error:  # raised again in the main thread
            errors.append(error)
        finally:
            finished.set()

    threading.Thread(target=run, daemon=True).start()
    interrupt = None
    try:
        while not finished.wait(1):
            every_second()
    except KeyboardInterrupt as first:
        if not request_stop():
            raise
        interrupt = first
        finished.wait()
    if errors:
        raise interrupt or errors[0]
    return results[0], interrupt
