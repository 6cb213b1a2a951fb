"""Part `tests` of `benchmarks/gpu.py`: the tests that need a GPU, `pytest -m gpu`."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import Any

from benchmarks.gpu import ROOT, Part

FOLDERS = ("tests/model", "tests/generate", "tests/train", "tests/evaluate")
PROCESSES = "4"
"""Processes of pytest-xdist, which share the GPU."""


def tests_part(part: Part) -> None:
    part.measure("pytest", lambda: outcome(part))


def outcome(part: Part) -> dict[str, Any]:
    """Numbers of tests by outcome, and the failures' last lines. At toy size, one small file on a CPU."""
    junit = part.out / "tests.xml"
    which = ["tests/model", "-k", "loss"] if part.toy else ["-m", "gpu", *FOLDERS]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    command += [*which, "-o", "junit_logging=no"] + ([] if part.toy else ["-n", PROCESSES])
    log = part.out / "tests-output.txt"
    with log.open("w") as out:
        try:
            code: int | None = subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=max(10, part.seconds_left),
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    if not junit.exists():
        return {"exit": code, "output": log.read_text()[-2000:]}
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    failed = {
        f"{case.get('classname')}.{case.get('name')}": (case.find(kind).get("message") or "")[:300]  # type: ignore[union-attr]
        for case in suite.iter("testcase")
        for kind in ("failure", "error")
        if case.find(kind) is not None
    }
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {"exit": code, **counts, "seconds": float(suite.get("time", 0)), "failed": failed}
