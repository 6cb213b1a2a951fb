"""A cluster with a token rejects connections without it at every port, and tokens are private.

The ports that Ray leaves open are listed here, so that a version of Ray that leaves more open fails these tests.
"""

import http.client
import os
import re
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import psutil
import pytest
import yaml

from igpt_ray.flows import local_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]

WORKERS_CALLS = ["CoreWorkerService/GetCoreWorkerStats", "CoreWorkerService/KillActor"]
CALLS = {
    "gcs_server": ["NodeInfoGcsService/GetAllNodeInfo", "JobInfoGcsService/GetAllJobInfo"],
    "raylet": ["NodeManagerService/GetSystemConfig", "ObjectManagerService/Pull"],
    "client": ["RayletDriver/ClusterInfo"],
    "ray::DashboardAgent": ["LogService/ListLogs", "ReporterService/GetTraceback", *WORKERS_CALLS],
}
"""What one may ask of a process over gRPC; of any other (a driver, an actor, what watches over a job) the workers'."""
JOB = """
import time, ray

@ray.remote(num_cpus=0)
class Worker:
    def ready(self):
        return True

ray.init()
worker = Worker.remote()
ray.get(worker.ready.remote())
time.sleep(600)
"""
PATHS = ["/api/version", "/api/jobs/", "/api/v0/nodes", "/nodes", "/logs", "/metrics"]
OPEN = {"/", "/api/gcs_healthz", "/api/authentication_mode", "/api/local_raylet_healthz"}
"""Of the dashboard and its agent; what they say is whether Ray is well."""


class Port(NamedTuple):
    process: str
    host: str
    port: int


class Started(NamedTuple):
    token: str
    ports: list[Port]
    dashboard: Port


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    with local_cluster.ray_cluster(tmp_path_factory.mktemp("logs"), 1, {}) as client:
        (head,) = [p for p in psutil.Process().children() if {"start", "--head"} <= set(p.cmdline())]
        words = ["ray", "job", "submit", "--no-wait", "--", sys.executable, "-c", JOB]
        subprocess.run(words, env=client, check=True, capture_output=True, timeout=250)
        late: list[Port] = []
        awaited = ("ray::DashboardAgent", "client", "ray::Worker")
        deadline = time.monotonic() + 200
        while len(late) < 6 and time.monotonic() < deadline:  # four of the agent: HTTP, metrics, gRPC, its tasks
            time.sleep(1)
            ports = listening(head)
            late = [p for p in ports if p.process in awaited and p.host == "127.0.0.1"]
        dashboard = int(client["RAY_API_SERVER_ADDRESS"].rsplit(":", 1)[1])
        yield Started(client["RAY_AUTH_TOKEN"], ports, Port("dashboard", "127.0.0.1", dashboard))


def listening(head: psutil.Process) -> list[Port]:
    found = set()
    for process in head.children(recursive=True):
        try:
            words = process.cmdline()
            name = words[0].split("/")[-1].split()[0]
            name = "client" if "ray.util.client.server" in words else name
            for part in ("dashboard/dashboard.py", "_private/monitor.py"):
                name = Path(part).stem if any(part in word for word in words) else name
            sockets = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        except (psutil.Error, IndexError):
            continue
        found |= {
            Port(name, "127.0.0.1" if s.ip in ("::", "0.0.0.0") else s.ip.removeprefix("::ffff:"), s.port)
            for s in sockets
        }
    return sorted(found)


def metrics_of(port: Port) -> bool:
    """Whether the port returns Prometheus' text format for any request."""
    try:
        with urllib.request.urlopen(f"http://{port.host}:{port.port}/no/such/path", timeout=10) as answer:
            return bool(answer.read().startswith(b"# HELP"))
    except (OSError, http.client.HTTPException):
        return False


def over_http(port: Port, path: str, token: str | None) -> int | None:
    """Status of an HTTP request; None if the port does not use HTTP."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"http://{port.host}:{port.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException):
        return None


def over_grpc(port: Port, call: str, token: str | None) -> str:
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"{port.host}:{port.port}") as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


WRONG = [None, "0" * 64]


def test_every_http_port_rejects_requests_without_a_token(started: Started) -> None:
    """Dashboard, job API and the node's agents; the right token is accepted."""
    asked = [p for p in started.ports if not metrics_of(p) and over_http(p, "/", None) is not None]
    assert started.dashboard in asked
    assert {p.process for p in asked} >= {"dashboard", "ray::DashboardAgent"}
    for port in asked:
        answers = {(path, wrong): over_http(port, path, wrong) for path in PATHS for wrong in WRONG}
        assert {a for a in answers.values() if a not in (401, 403, 404)} == set(), (port, answers)
    assert over_http(started.dashboard, "/api/version", started.token) == 200
    assert over_http(started.dashboard, "/api/jobs/", started.token) == 200


def test_every_grpc_port_rejects_requests_without_a_token(started: Started) -> None:
    """Control store, raylet, object manager, agent, Ray Client, and a job's driver and actor."""
    asked = [p for p in started.ports if over_http(p, "/", None) is None]
    named = {"gcs_server", "raylet", "ray::DashboardAgent", "client", Path(sys.executable).name, "ray::Worker"}
    assert {p.process for p in asked} >= named | {"ray::JobSupervisor"}
    for port in asked:
        calls = CALLS.get(port.process, WORKERS_CALLS)
        answers = {(call, wrong): over_grpc(port, call, wrong) for call in calls for wrong in WRONG}
        known = {answer for answer in answers.values() if answer != "UNIMPLEMENTED"}
        assert known == {"UNAUTHENTICATED"}, (port, answers)
    for process, call in (("gcs_server", "NodeInfoGcsService/GetAllNodeInfo"), ("ray::Worker", WORKERS_CALLS[0])):
        (port,) = [p for p in asked if p.process == process]
        assert over_grpc(port, call, started.token) == "OK"


def test_the_open_ports_are_the_known_ones(started: Started) -> None:
    """Health and metrics, including the autoscaler's, are restricted only by security group and network policy."""
    assert {p.process for p in started.ports if metrics_of(p)} <= {"dashboard", "monitor", "ray::DashboardAgent"}
    assert {over_http(started.dashboard, path, None) for path in OPEN - {"/api/local_raylet_healthz"}} == {200}


@pytest.mark.parametrize("token", ["", "0" * 64, "the right one"])
def test_a_driver_without_the_token_is_rejected(started: Started, token: str) -> None:
    """Both a driver that connects and a submitted job."""
    (gcs,) = [p for p in started.ports if p.process == "gcs_server"]
    right = token == "the right one"
    others = ("RAY_AUTH", "RAY_ADDRESS")  # an address in the environment beats the one that is given
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    shown = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": started.token if right else token}
    env |= shown if token else {"RAY_AUTH_MODE": "disabled"}
    join = [sys.executable, "-c", f"import ray; ray.init('127.0.0.1:{gcs.port}')"]
    submit = ["ray", "job", "submit", "--address", f"http://127.0.0.1:{started.dashboard.port}", "--", "true"]
    for command in (join, submit):
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
        assert (ended.returncode == 0) == right, (command, ended.stderr[-500:])


# ------------------------------------------------------------------------------------------------ files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_token_of_a_local_cluster_is_private(tmp_path: Path) -> None:
    """Ray itself would create it readable for all users."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    code = "import os; os.umask(0o022); from igpt_ray.flows import job; job.connect()"
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=200, capture_output=True)
    assert mode(tmp_path / ".ray" / "auth_token") == 0o600


def test_the_token_of_the_readme_is_private(tmp_path: Path) -> None:
    """The documented command, with the usual umask."""
    (made,) = re.findall(r"^\(umask 077.*auth_token\)$", (ROOT / "docs" / "clusters.md").read_text(), re.MULTILINE)
    subprocess.run(["bash", "-c", f"umask 022; {made}"], env={**os.environ, "HOME": str(tmp_path)}, check=True)
    assert mode(tmp_path / ".igpt" / "auth_token") == 0o600
    assert mode(tmp_path / ".igpt") == 0o700
    assert len((tmp_path / ".igpt" / "auth_token").read_text().strip()) == 64


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_token_on_nodes_is_private(name: str, tmp_path: Path) -> None:
    """The set-up command of the cluster file, on a copied folder."""
    (command,) = yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())["setup_commands"]
    folder = tmp_path / ".igpt"
    folder.mkdir(mode=0o755)
    (folder / "auth_token").write_text("x")
    (folder / "auth_token").chmod(0o644)
    subprocess.run(["bash", "-c", command.replace("/home/ray/.igpt", str(folder))], check=True)
    assert (mode(folder), mode(folder / "auth_token")) == (0o700, 0o600)
