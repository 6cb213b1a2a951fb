"""A cluster whose object store, workers and messages fail: the same shards, the same hashes.

What needs no cluster is in test_faults.py, test_kills.py, test_damage.py and test_full_disk.py.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import Keyed
from faults import FaultProxy, running, seeded

from igpt_ray import storage
from igpt_ray.data.config import PixelsConfig, PrepareConfig
from igpt_ray.data.token_store import TokenStore
from igpt_ray.flows import prepare
from igpt_ray.settings import PoolConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_a_preparation_with_faults_writes_the_same_shards(
    prepared: str, digit_images: str, rclone_s3: Keyed, aws: Callable[..., None], on_rclone: str
) -> None:
    """A fifth of all requests fail, some after they took effect; the job has a Ray of its own, with the key."""
    for entry in storage.walk(digit_images):
        storage.write(f"{on_rclone}/images{entry.uri.removeprefix(digit_images)}", storage.read(entry.uri))
    storage.write(f"{on_rclone}/palette.npy", storage.read(f"{prepared}/palette.npy"))
    words = ["--source", f"{on_rclone}/images", "--palette", f"{on_rclone}/palette.npy"]
    words += ["--tokens", f"{on_rclone}/tokens", "--shard-images", "50"]
    words += ["--pixels.n-px", "8", "--pixels.crop", "centre"]
    proxy = FaultProxy(int(rclone_s3.endpoint.rsplit(":", 1)[1]), seeded(2, 10_000, 0.2))
    with running(proxy) as endpoint:
        env = {**os.environ, "AWS_ENDPOINT_URL": endpoint, "RAY_ADDRESS": "local"}
        command = [sys.executable, "jobs/prepare.py", *words]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert proxy.faults > 20
    through_faults = TokenStore.open(f"{on_rclone}/tokens").manifest
    assert through_faults.shards == TokenStore.open(f"{prepared}/tokens").manifest.shards


@pytest.mark.ray
def test_a_preparation_with_killed_workers_writes_the_same_shards(
    cluster: str, prepared: str, digit_images: str, tmp_path: Path
) -> None:
    """SIGKILL of every actor at work, twice, while the driver lives: Ray starts others, which find half of the work."""
    settings = PrepareConfig(
        source=digit_images,
        palette=f"{prepared}/palette.npy",
        tokens=str(tmp_path / "tokens"),
        shard_images=3,
        pixels=PixelsConfig(n_px=8, crop="centre"),
        pool=PoolConfig(size=2),
    )
    undisturbed = prepare.prepare(settings.model_copy(update={"tokens": str(tmp_path / "undisturbed")}))
    killed: list[int] = []

    def kill_at(n_shards: int) -> None:
        while len(list((tmp_path / "tokens").glob("*/*.parquet"))) < n_shards:
            time.sleep(0.002)
        for process in psutil.Process().children(recursive=True):  # the raylets of `cluster` are children of ours
            with contextlib.suppress(psutil.Error):  # it may end by itself meanwhile
                if any("_Actor" in word for word in process.cmdline()):
                    process.kill()
                    killed.append(process.pid)

    killer = threading.Thread(target=lambda: [kill_at(4), kill_at(25)], daemon=True)
    killer.start()
    report = prepare.prepare(settings)
    killer.join()
    assert len(killed) >= 2
    assert report["images"] == undisturbed["images"] == 160
    disturbed, expected = TokenStore.open(settings.tokens), TokenStore.open(str(tmp_path / "undisturbed"))
    assert disturbed.manifest.shards == expected.manifest.shards
    assert len(list((tmp_path / "tokens").glob("*/*.parquet"))) == len(expected.manifest.shards)


RPC_FAILURES = {
    "CoreWorkerService.grpc_client.PushTask": {"num_failures": 20, "req_failure_prob": 25, "resp_failure_prob": 25},
    "NodeManagerService.grpc_client.RequestWorkerLease": {
        "num_failures": 5,
        "req_failure_prob": 50,
        "resp_failure_prob": 25,
    },
}


@pytest.mark.ray
@pytest.mark.slow
def test_a_preparation_with_lost_messages_writes_the_same_shards(
    prepared: str, digit_images: str, tmp_path: Path
) -> None:
    """Ray drops a part of the requests to workers, and of their answers: a task whose answer is lost may run twice."""
    words = ["--source", digit_images, "--palette", f"{prepared}/palette.npy", "--tokens", str(tmp_path / "tokens")]
    words += ["--shard-images", "50", "--pixels.n-px", "8", "--pixels.crop", "centre"]
    with tempfile.TemporaryDirectory(dir="/tmp") as session:  # short, for the names of Ray's sockets
        env = {**os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": session}
        env["RAY_testing_rpc_failure"] = json.dumps(RPC_FAILURES)
        command = [sys.executable, "jobs/prepare.py", *words]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        logs = "".join(p.read_text(errors="replace") for p in Path(session).rglob("*.log"))
    assert done.returncode == 0, done.stderr[-2000:]
    for what in ("request", "response"):
        assert logs.count(f"Inject RPC {what} failure for CoreWorkerService.grpc_client.PushTask") > 1
    through_failures = TokenStore.open(str(tmp_path / "tokens")).manifest
    assert through_failures.shards == TokenStore.open(f"{prepared}/tokens").manifest.shards
