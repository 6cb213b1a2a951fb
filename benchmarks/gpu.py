"""Everything that a GPU must show, in one command for a short slot on a machine that may lack Ray, faiss and a network.

    python -m benchmarks.gpu where tests attention train sample checkpoint palette --out results --seconds 500
    python -m benchmarks.gpu report --out results

Each part runs in a process of its own with a share of the seconds, and writes `<out>/<part>.json` after every
measurement, so that a part that fails or runs out of time loses nothing. `--toy` takes tiny networks, for a CPU.
Speeds are compared with two ceilings that the part `where` measures: bytes copied and FLOPs of matrix products.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "where": "benchmarks.gpu_device",
    "attention": "benchmarks.gpu_device",
    "palette": "benchmarks.gpu_device",
    "tests": "benchmarks.gpu_tests",
    "train": "benchmarks.gpu_train",
    "checkpoint": "benchmarks.gpu_train",
    "sample": "benchmarks.gpu_sample",
    "learn": "benchmarks.gpu_learn",
}
"""Parts, and the modules that hold their functions. They are imported only where they run."""
SHARES = {"where": 20, "tests": 110, "attention": 30, "train": 240, "sample": 120, "checkpoint": 40, "palette": 40}
"""Relative share of the seconds of each part; the others count as `learn`."""
LEARN_SHARE = 500


class Part:
    """The settings of a running part, and its report."""

    def __init__(self, name: str, out: Path, seconds: float, toy: bool, only: list[str]):
        self.name, self.out, self.toy, self.only = name, out, toy, only
        self.ends = time.monotonic() + seconds
        self.report: dict[str, Any] = {"part": name, "toy": toy}

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def wants(self, name: str) -> bool:
        """Whether `--only` selects the measurement, and there is time for it."""
        if self.seconds_left <= 0:
            self.add(name, {"skipped": "no time left"})
            return False
        return not self.only or any(word in name for word in self.only)

    def add(self, name: str, value: Any) -> None:
        """Add a measurement and write the report."""
        self.report[name] = value
        (self.out / f"{self.name}.json").write_text(json.dumps(self.report, indent=1))
        print(f"{self.name}: {name}: {json.dumps(value)}", flush=True)

    def measure(self, name: str, work: Any) -> Any:
        """Add what `work()` returns, or its error. Returns None for an error."""
        if not self.wants(name):
            return None
        try:
            value = work()
        except Exception as error:  # a measurement that fails must not lose the others
            text = "".join(traceback.format_exception(error))
            print(text, flush=True)
            self.add(name, {"error": f"{type(error).__name__}: {str(error)[:500]}", "where": text[-1500:]})
            return None
        self.add(name, value)
        return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "report"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--seconds", type=float, default=500, help="budget of all parts")
    parser.add_argument("--only", nargs="*", default=[], help="measurements whose name contains one of these words")
    parser.add_argument("--toy", action="store_true", help="tiny networks, for a CPU")
    parser.add_argument("--here", action="store_true", help="run the one part in this process")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.parts == ["report"]:
        from benchmarks.gpu_report import markdown

        print(markdown(args.out))
        return 0
    if args.here:
        (name,) = args.parts
        part = Part(name, args.out, args.seconds, args.toy, args.only)
        getattr(importlib.import_module(PARTS[name]), f"{name}_part")(part)
        return 0
    return _run_parts(args)


def _run_parts(args: argparse.Namespace) -> int:
    ends, failed = time.monotonic() + args.seconds, 0
    weights = [SHARES.get(name, LEARN_SHARE) for name in args.parts]
    for i, name in enumerate(args.parts):
        seconds = max(5.0, (ends - time.monotonic()) * weights[i] / sum(weights[i:]))
        command = [sys.executable, "-m", "benchmarks.gpu", name, "--here", "--out", str(args.out.resolve())]
        command += ["--seconds", f"{seconds:.0f}"] + ["--toy"] * args.toy
        command += ["--only", *args.only] if args.only else []
        started = time.monotonic()
        with (args.out / f"{name}.log").open("w") as log:
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            assert child.stdout is not None
            for line in child.stdout:
                log.write(line)
                if line.startswith(f"{name}: "):
                    print(line[:400], end="", flush=True)
            code = child.wait()
        failed += code != 0
        print(f"== {name}: exit {code} after {time.monotonic() - started:.0f} of {seconds:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
