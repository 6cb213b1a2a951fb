"""What every job does with errors, and that the demo cleans up after itself."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import BaseModel

from igpt_ray import object_clients, storage
from igpt_ray.data import sources
from igpt_ray.data.config import PaletteConfig, PixelsConfig
from igpt_ray.data.make_shard import MakeShard, Task
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import IgptError, NotFound
from igpt_ray.evaluate.config import EvaluateConfig
from igpt_ray.flows import evaluate, job, prepare, train
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.settings import PoolConfig
from igpt_ray.train.config import DataConfig, PretrainConfig

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]


def error_line(capsys: pytest.CaptureFixture[str], flow: Callable[[Any], Any], settings: BaseModel) -> str:
    """Runs a job's body; it must exit with 1 and say one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        job.finish(flow, settings)
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]


def test_processes_of_a_local_cluster_join_it() -> None:
    """Parts of Ray that are not told may take another on the machine, and stop workers that are not known there."""
    code = """
import os, ray
from igpt_ray.flows import job

job.connect()
told = ray.get(ray.remote(lambda: os.environ["RAY_ADDRESS"]).remote())
assert told == ray.get_runtime_context().gcs_address, told
"""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=200)


def test_invalid_uris_are_errors_of_one_line(
    cluster: str, on_rclone: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def palette(source: str) -> PaletteConfig:
        return PaletteConfig(source=source, out=str(tmp_path / "palette.npy"))

    said = error_line(capsys, prepare.fit_palette, palette("s3://no-such-bucket/images"))
    assert "bucket 'no-such-bucket' does not exist" in said
    assert "create it" in said
    (tmp_path / "empty").mkdir()
    for nothing in (on_rclone, str(tmp_path / "empty"), str(tmp_path / "absent")):
        assert "does not exist or holds no files" in error_line(capsys, prepare.fit_palette, palette(nothing))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    object_clients.clear_cache()
    said = error_line(capsys, prepare.fit_palette, palette(on_rclone))
    assert "refused the key" in said
    assert "AWS_SECRET_ACCESS_KEY" in said
    said = error_line(capsys, train.pretrain, PretrainConfig(data=DataConfig(tokens=on_rclone)))
    assert "refused the key" in said
    said = error_line(
        capsys, evaluate.evaluate, EvaluateConfig(release=str(tmp_path / "r"), tokens=str(tmp_path / "t"))
    )
    assert "run jobs/prepare.py" in said


def test_an_error_in_an_actor_reaches_the_user_unchanged(
    cluster: str, prepared: str, digit_images: str, tmp_path: Path
) -> None:
    """In a task and in the constructor: what Ray makes of it has lost the type, and is many lines long."""
    kind = TokenStore.open(storage.join(prepared, "tokens")).kind
    unit = sources.plan(digit_images, 10).units[0]
    vanished = replace(unit, content=replace(unit.content, root=str(tmp_path / "vanished")))
    for root, missing in ((storage.join(prepared, "tokens"), "vanished"), (str(tmp_path), "palette.npy")):
        arguments = {"root": root, "kind": kind, "pixels": PixelsConfig(n_px=8), "holdout": 0.0, "committed": {}}
        with pytest.raises(NotFound, match=f"{missing}.* does not exist$"):
            list(actor_map([Task(vanished, 9)], MakeShard, arguments, PoolConfig()))


def test_a_bug_keeps_its_traceback(cluster: str) -> None:
    def broken(_: BaseModel) -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job.finish(broken, PoolConfig())


def test_a_job_ends_with_one_json_line(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    job.finish(lambda _: {"answer": 42, "seconds": 1.5}, PoolConfig())
    assert json.loads(capsys.readouterr().out) == {"answer": 42, "seconds": 1.5}


def test_errors_can_be_pickled() -> None:
    import pickle

    pending: list[type[IgptError]] = [IgptError]
    while pending:
        kind = pending.pop()
        pending += [child for child in kind.__subclasses__() if child.__module__.startswith("igpt_ray")]  # not Ray's
        again = pickle.loads(pickle.dumps(kind("what to do")))
        assert (type(again), str(again)) == (kind, "what to do")


def command_line(process: psutil.Process) -> str:
    """Empty if the process has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def handle_sigint() -> None:
    """A shell has the programs that it starts in the background ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_stops_its_processes(ending: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a stage: no Ray, no S3 server, no worker is left."""
    command = [sys.executable, "jobs/demo.py", "--store", "s3", "--out", str(tmp_path / "demo")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    demo = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=handle_sigint)
    assert demo.stderr is not None
    seen = []
    for line in demo.stderr:
        seen.append(line)
        if line.startswith("--- palette"):
            break
    time.sleep(4)  # in the middle of the stage
    children = psutil.Process(demo.pid).children(recursive=True)
    names = " ".join(map(command_line, children))
    assert "rclone" in names, seen
    assert "raylet" in names
    demo.send_signal(ending)
    assert demo.wait(60) == 128 + ending
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, [child.cmdline() for child in alive]
