"""Progress: a bar in a terminal, lines at an interval elsewhere."""

import fcntl
import logging
import os
import pty
import struct
import sys
import termios

import pytest
from conftest import ROOT

from igpt_ray import progress


def test_a_pipe_gets_a_line_at_an_interval_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "igpt_ray")
    counted = progress.Progress("prepare", 130, "images", done=10)
    for second in range(1, 13):
        now[0] = float(second)
        counted.add(10, "1 rejected")
    assert caplog.messages == [
        "prepare: 110 of 130 images, 10.0 images/s, 00:02 left, 1 rejected",
        "prepare: 130 of 130 images, 10.0 images/s, 1 rejected",
    ]


def test_reused_units_do_not_count_towards_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    counted = progress.Progress("prepare", 200, "images")
    counted.add(100, reused=True)
    now[0] = 5.0
    counted.add(50)
    assert counted.line() == "prepare: 150 of 200 images, 10.0 images/s, 00:05 left"


def test_a_terminal_gets_one_line_that_is_rewritten_and_log_lines_above_it() -> None:
    program = """
import logging
from igpt_ray import progress
log = logging.getLogger("igpt_ray"); log.addHandler(progress.LogHandler()); log.setLevel(logging.INFO)
counted = progress.Progress("prepare", 3, "images")
for i in range(3):
    counted.add(1)
    log.info("message %d", i)
"""
    pid, terminal = pty.fork()
    if pid == 0:  # the child, whose stderr is the terminal
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", program])
    output = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the terminal closes when the child ends
            break
        if not part:
            break
        output += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = output.decode()
    assert "images/s" in text
    assert "100%" in text
    assert [line.rstrip("\r").rsplit("\r", 1)[-1].strip() for line in text.split("\n") if "message" in line] == [
        f"message {i}" for i in range(3)
    ]
