"""Ctrl-C and SIGTERM: exit codes, and tasks that finish before the program ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from igpt_ray.interrupt import Terminated, run_interruptible

ENDINGS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]

SLEEPING = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has its programs ignore SIGINT
from igpt_ray import interrupt
with interrupt.exits_on_interrupt():
    print("ready", flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize(("signum", "code", "word"), ENDINGS)
def test_a_signal_ends_a_program_with_one_line_and_its_exit_code(signum: int, code: int, word: str) -> None:
    program = subprocess.Popen([sys.executable, "-c", SLEEPING], stdout=-1, stderr=-1, text=True)
    assert program.stdout is not None
    program.stdout.readline()
    program.send_signal(signum)
    _, err = program.communicate(timeout=10)
    assert (program.returncode, err) == (code, f"{word}\n")


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell has the programs that it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_soon(signum: int = signal.SIGINT) -> None:
    threading.Timer(0.2, os.kill, (os.getpid(), signum)).start()


def test_a_task_that_can_stop_is_waited_for_and_its_interrupt_is_returned() -> None:
    stop = threading.Event()

    def request_stop() -> bool:
        stop.set()
        return True

    interrupt_soon()
    stopped, interrupt = run_interruptible(lambda: stop.wait(20), request_stop)
    assert stopped
    assert isinstance(interrupt, KeyboardInterrupt)
    assert not isinstance(interrupt, Terminated)


def test_a_task_that_cannot_stop_is_left_at_once() -> None:
    interrupt_soon()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_interruptible(lambda: time.sleep(20), lambda: False)
    assert time.monotonic() - started < 10


def test_errors_and_results_of_an_undisturbed_task_reach_the_caller() -> None:
    assert run_interruptible(lambda: 7, lambda: True) == (7, None)
    with pytest.raises(ZeroDivisionError):
        run_interruptible(lambda: 1 // 0, lambda: True)


def test_after_an_interrupt_an_error_of_the_task_does_not_hide_it() -> None:
    stop = threading.Event()

    def task() -> None:
        stop.wait(20)
        raise ValueError

    interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        run_interruptible(task, lambda: stop.set() or True)
