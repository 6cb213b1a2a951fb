"""Several raylets on one machine with Ray's autoscaler, for tests of lost and added nodes."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray._private.services
from conftest import free_port


def children(node: Any) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(node.all_processes["raylet"][0].process.pid).children()
    return []


def title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def until(reached: Callable[[], Any], driver: subprocess.Popen[bytes], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert driver.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""The node id under which the provider below knows the head."""


@dataclass
class Autoscaler:
    address: str
    pid: int
    """Of `ray start`, from which all its nodes descend."""


@contextmanager
def autoscaled(
    folder: Path,
    types: dict[str, dict[str, Any]],
    idle_minutes: float = 1,
    dashboard: int | None = None,
    part: str = "",
) -> Iterator[Autoscaler]:
    """A head without CPUs, and Ray's autoscaler with a provider that starts raylets of these types on this machine.

    `ray.cluster_utils.AutoscalingCluster` lacks a file in the wheel, and would stop every Ray on the machine.
    """
    port, scratch = free_port(), tempfile.mkdtemp(prefix="igpt-")  # short: Ray puts Unix sockets below it
    ip = ray._private.services.get_node_ip_address()
    cloud = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        **dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True),
        **{"launch_multiple": True, "head_node_id": HEAD, "gcs_address": f"{ip}:{port}"},
    }
    kinds = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        **types,
    }
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    settings = {
        **{"cluster_name": "cloud", "max_workers": 9, "idle_timeout_minutes": idle_minutes, "provider": cloud},
        **{"available_node_types": kinds, "head_node_type": "ray.head.default", "auth": {}, "docker": {}},
        **{f"{name}_commands": [] for name in commands},
        **{"file_mounts": {}, "cluster_synced_files": [], "rsync_exclude": [], "rsync_filter": []},
    }
    file = folder / "cloud.yaml"
    file.write_text(json.dumps(settings))  # which is YAML too
    env = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1"}
    env |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    command = ["ray", "start", "--head", "--block", "--num-cpus=0", f"--port={port}", f"--temp-dir={scratch}"]
    command += [f"--autoscaling-config={file}", f"--object-store-memory={100 << 20}"]
    command += [f"--include-dashboard={str(dashboard is not None).lower()}", f"--dashboard-port={dashboard or 8265}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
    command += [f"--ray-client-server-port={free_port()}", f"--metrics-export-port={free_port()}"]
    command += [f"--labels=ray-subcluster={part}"] if part else []
    with open(folder / "head.log", "w") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until(lambda: "Ray runtime started" in (folder / "head.log").read_text(), head)
        yield Autoscaler(f"{ip}:{port}", head.pid)
    finally:
        started: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):  # it ended by itself
            started = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for process in started:
            with suppress(psutil.Error):
                process.kill()
        head.wait()
        shutil.rmtree(scratch, ignore_errors=True)
