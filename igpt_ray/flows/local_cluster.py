"""A Ray cluster and an S3 server on this machine for the duration of a `with` block, for the demo and the tests.

Servers listen on free ports and require random keys. The S3 server and Ray's dashboard listen on loopback only. All
started processes are stopped when the block ends, also by an exception.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from igpt_ray.errors import IgptError

ROOT = Path(__file__).resolve().parents[2]
"""The repository, the working directory of submitted jobs."""
START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 5
FLOW_LINE = re.compile(r"\d\d:\d\d:\d\d .*")
"""A log line of a flow, after Ray's optional process prefix."""


class StageFailed(IgptError):
    """A submitted job or a server failed. The message names the log."""


def free_port() -> int:
    """A free port, from the ephemeral range, which is above Ray's range for workers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def ray_cluster(logs: Path, n_cpus: int, env: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Start a Ray head with a dashboard, token authentication and `env`. Yields the environment for clients.

    Jobs inherit the node's environment, so `env` contains the object store's credentials.
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
        with _group(command, client, logs / "cluster.log") as process:
            _until(lambda: _answers(f"{client['RAY_API_SERVER_ADDRESS']}/api/version", client), process, "Ray")
            yield client
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def s3_server(folder: Path, bucket: str, logs: Path) -> Iterator[dict[str, str]]:
    """Run rclone's S3 server on `folder`, with one bucket and a random key. Yields the environment for clients."""
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
    with _group(command, os.environ, logs / "s3.log") as process:
        _until(lambda: _listens(port), process, "the S3 server")
        yield env


def submit(words: list[str], client: Mapping[str, str], log: Path, on_line: Callable[[str], None]) -> dict[str, Any]:
    """Run `ray job submit -- python jobs/...` to its end. Returns the job's JSON line.

    The whole output goes to the file `log`; log lines of flows also go to `on_line`. Raises `StageFailed` with the
    job's error.
    """
    command = ["ray", "job", "submit", "--working-dir", str(ROOT), "--", "python", *words]
    lines = []
    with open(log, "w") as file, _group(command, client) as process:
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            lines.append(line.strip())
            if flow_line := FLOW_LINE.search(line):
                on_line(flow_line[0])
    if process.returncode != 0:
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
        raise StageFailed(f"{words[0]}: {errors[-1]} (its log: {log})")
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))


@contextmanager
def submitted(words: list[str], client: Mapping[str, str], log: Path, ready: str) -> Iterator[None]:
    """Submit a job that serves, wait until the URL `ready` answers, and stop the job at the end of the block."""
    name = f"serve-{secrets.token_hex(4)}"
    command = ["ray", "job", "submit", "--working-dir", str(ROOT), "--submission-id", name, "--", "python", *words]
    with _group(command, client, log) as process:
        try:
            _until(lambda: _answers(ready, {}), process, f"{words[0]} (its log: {log})")
            yield
        finally:
            subprocess.run(["ray", "job", "stop", name], env=dict(client), capture_output=True, check=False)


@contextmanager
def _group(command: list[str], env: Mapping[str, str], log: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run a process in its own session, so that Ctrl-C does not reach it. Its descendants are killed at the end.

    Its output goes to `log`, or else to a pipe.
    """
    import psutil

    with open(log, "w") if log else nullcontext(subprocess.PIPE) as output:
        process = subprocess.Popen(
            command, env=dict(env), stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    try:
        yield process
        if log is None:
            process.wait()
    finally:
        descendants: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            descendants = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for descendant in descendants:
            with suppress(psutil.NoSuchProcess):
                descendant.kill()


def _until(ready: Callable[[], bool], process: subprocess.Popen[str], name: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if process.poll() is not None:
            raise StageFailed(f"{name} exited during its start")
        if time.monotonic() > deadline:
            raise StageFailed(f"{name} did not answer within {START_TIMEOUT_S} s")
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
