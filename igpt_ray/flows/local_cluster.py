"""A Ray cluster and an S3 server on this machine, for as long as a `with` block lasts; and jobs submitted to it.

The demo and the tests stand on this. Servers listen on free ports under random keys (the S3 server and Ray's
dashboard on loopback only), and what was started is stopped, whatever ends the block.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from igpt_ray.errors import IgptError

ROOT = Path(__file__).resolve().parents[2]
"""The repository: what is submitted as working directory."""
START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 5
OUR_LINE = re.compile(r"\d\d:\d\d:\d\d .*")
"""What flows log, with or without Ray's prefix of the process it came from."""


class StageFailed(IgptError):
    """A submitted job, or a server, that did not do its work; the message says where its log is."""


def free_port() -> int:
    """A port nobody listens on now. Ephemeral, hence above the range that Ray claims for workers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def ray_cluster(logs: Path, n_cpus: int, env: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """`ray start --head` with a dashboard, token authentication and `env`; yields what a client's environment needs.

    Nodes hand their environment to the jobs, as instance roles would: `env` carries the object store's key.
    """
    scratch = tempfile.mkdtemp(prefix="igpt-")  # short: Ray puts Unix sockets below it
    dashboard = free_port()
    client = {
        **os.environ,
        **env,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    client.pop("RAY_ADDRESS", None)
    ports = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    command = ["ray", "start", "--head", "--block", "--include-dashboard=true", "--node-ip-address=127.0.0.1"]
    command += [f"--num-cpus={n_cpus}", f"--object-store-memory={300 << 20}", f"--temp-dir={scratch}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += ["--min-worker-port=0", "--max-worker-port=0"] + [f"--{name}={free_port()}" for name in ports]
    try:
        with _process(command, client, logs / "cluster.log") as alive:
            _until(lambda: _answers(f"{client['RAY_API_SERVER_ADDRESS']}/api/version", client), alive, "Ray")
            yield client
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def s3_server(folder: Path, bucket: str, logs: Path) -> Iterator[dict[str, str]]:
    """rclone's S3 server over `folder`, with one bucket and a random key; yields the environment that reaches it."""
    (folder / bucket).mkdir(parents=True, exist_ok=True)
    config = folder / ".rclone.conf"
    config.touch()
    port, key, secret = free_port(), secrets.token_hex(10), secrets.token_hex(20)
    rclone = Path(sys.executable).parent / "rclone"
    command = [str(rclone), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}"]
    command += ["--config", str(config), str(folder)]
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with _process(command, dict(os.environ), logs / "s3.log") as alive:
        _until(lambda: _listens(port), alive, "the S3 server")
        yield env


def submit(words: list[str], client: Mapping[str, str], log: Path, show: Callable[[str], None]) -> dict[str, Any]:
    """`ray job submit -- python jobs/...`, followed to its end; returns the job's JSON line.

    Our own log lines go to `show`, everything to the file `log`. Raises `StageFailed` with the job's error.
    """
    command = ["ray", "job", "submit", "--working-dir", str(ROOT), "--", "python", *words]
    lines = []
    with open(log, "w") as file, _group(command, dict(client), subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            lines.append(line.strip())
            if ours := OUR_LINE.search(line):
                show(ours[0])
    if process.returncode != 0:
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
        raise StageFailed(f"{words[0]}: {errors[-1]} (its log: {log})")
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))


@contextmanager
def submitted(words: list[str], client: Mapping[str, str], log: Path, ready: str) -> Iterator[None]:
    """A job that serves until it is stopped: submitted, waited for at the URL `ready`, stopped at the end."""
    name = f"serve-{secrets.token_hex(4)}"
    command = ["ray", "job", "submit", "--working-dir", str(ROOT), "--submission-id", name, "--", "python", *words]
    with open(log, "w") as file, _group(command, dict(client), file) as process:
        try:
            _until(lambda: _answers(ready, {}), lambda: process.poll() is None, f"{words[0]} (its log: {log})")
            yield
        finally:
            subprocess.run(["ray", "job", "stop", name], env=dict(client), capture_output=True, check=False)


@contextmanager
def _process(command: list[str], env: dict[str, str], log: Path) -> Iterator[Callable[[], bool]]:
    """A server for the length of the block; yields a function that tells whether it still runs."""
    with open(log, "w") as file, _group(command, env, file) as process:
        yield lambda: process.poll() is None


@contextmanager
def _group(command: list[str], env: dict[str, str], output: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, so that Ctrl-C reaches us first; ended with all its children."""
    process = subprocess.Popen(
        command, env=env, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
        if output is subprocess.PIPE:
            process.wait()
    finally:
        children = _descendants(process.pid)
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in children:
            _kill(pid)


def _descendants(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _until(ready: Callable[[], bool], alive: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if not alive():
            raise StageFailed(f"{what} ended while it was starting")
        if time.monotonic() > deadline:
            raise StageFailed(f"{what} did not answer within {START_TIMEOUT_S} s")
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


def _answers(url: str, client: Mapping[str, str]) -> bool:
    headers = {"Authorization": f"Bearer {client['RAY_AUTH_TOKEN']}"} if "RAY_AUTH_TOKEN" in client else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
