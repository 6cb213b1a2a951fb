"""All stages on a cluster that is nothing but its head while nobody works, under Ray's own autoscaler.

The node types are those of `cluster/aws.yaml`, scaled down: raylets on this machine. Whether the cloud gives nodes is
the cloud's affair (test_cluster.py); whether the jobs ask for the right ones, wait, and give them back, is told here.
"""

import base64
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import ROOT, free_port
from raylets import Autoscaler, autoscaled, title, until

from igpt_ray import storage
from igpt_ray.data import pixels as images

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1500)]

TYPES = {
    "cpu": {"CPU": 1},  # of 32
    "gpu1": {"CPU": 1, "GPU": 1},  # of 4 and 1
    "gpu8": {"CPU": 2, "GPU": 2},  # of 192 and 8; here is no NCCL, so a worker asks for two CPUs, and no GPU
}
AT_MOST = {"cpu": 4, "gpu1": 2, "gpu8": 2}


class Counts(threading.Thread):
    """How many nodes of each type there are, whenever that changes."""

    def __init__(self, address: str):
        super().__init__(daemon=True)
        from ray._raylet import GcsClient

        self.gcs, self.began = GcsClient(address=address), time.monotonic()
        self.lines: list[tuple[float, str, dict[str, int]]] = []
        self.stage, self.over = "an empty cluster", threading.Event()

    def run(self) -> None:
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        while not self.over.wait(0.5):
            alive = self.gcs.get_all_node_info(state_filter=GcsNodeInfo.GcsNodeState.ALIVE).values()
            kinds = [kind_of(dict(node.resources_total)) for node in alive]
            now = {kind: kinds.count(kind) for kind in TYPES}
            if not self.lines or self.lines[-1][1:] != (self.stage, now):
                self.lines.append((time.monotonic() - self.began, self.stage, now))

    def most(self, stage: str, kind: str) -> int:
        return max(now[kind] for _, said, now in self.lines if said == stage)

    def now(self) -> dict[str, int]:
        return self.lines[-1][2] if self.lines else {}

    def table(self) -> str:
        rows = [f"| {seconds:.0f} | {stage} | {' | '.join(map(str, n.values()))} |" for seconds, stage, n in self.lines]
        return "\n".join(["| seconds | stage | " + " | ".join(TYPES) + " |", "|---|---|---|---|---|", *rows])


def kind_of(resources: dict[str, float]) -> str:
    """The head has no CPU, and so no type here."""
    own = {name: int(resources[name]) for name in ("CPU", "GPU") if resources.get(name)}
    return next((kind for kind, has in TYPES.items() if has == own), "head")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[tuple[Autoscaler, int]]:
    """The cluster, and the port of its dashboard."""
    port = free_port()
    small = {"object_store_memory": 100 << 20}
    types = {
        kind: {"resources": has | small, "node_config": {}, "max_workers": AT_MOST[kind]} for kind, has in TYPES.items()
    }
    types["cpu"]["labels"] = {"ray-subcluster": "cpu"}
    with autoscaled(tmp_path, types, idle_minutes=0.2, dashboard=port, part="cpu") as found:
        yield found, port


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures that take a while to decode, so that there is something to scale for."""
    folder = tmp_path_factory.mktemp("noise")
    picture = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    for i in range(96):
        storage.write(str(folder / "train" / "ab"[i % 2] / f"{i}.png"), images.png(np.roll(picture, i, 0)))
    return str(folder)


def test_every_stage_scales_its_nodes_up_and_down(cloud: tuple[Autoscaler, int], noise: str, tmp_path: Path) -> None:
    scaler, dashboard = cloud
    counts = Counts(scaler.address)
    counts.start()
    place = {name: str(tmp_path / name) for name in ("palette.npy", "tokens", "runs")}
    pixels = ["--pixels.n-px", "4"]
    run = Run(scaler, counts, tmp_path)

    run.job("palette", "--source", noise, "--out", place["palette.npy"], "--k", "16", "--images", "8", *pixels)
    words = ["--source", noise, "--palette", place["palette.npy"], "--tokens", place["tokens"], *pixels]
    run.job("prepare", *words, "--views", "40", "--shard-images", "8")
    assert counts.most("prepare", "cpu") == AT_MOST["cpu"]
    assert (counts.most("prepare", "gpu1"), counts.most("prepare", "gpu8")) == (0, 0)  # for their CPUs
    run.until_empty()

    train = ["tiny", "--data.tokens", place["tokens"], "--run.root", place["runs"], "--run.name", "s1"]
    train += ["--model.n-layer", "1", "--model.n-embd", "16", "--model.n-head", "2", "--model.n-px", "4"]
    train += ["--model.n-vocab", "16", "--optim.batch-size", "8", "--optim.steps", "150", "--optim.warmup-steps", "2"]
    train += ["--run.checkpoint-every", "5", "--workers.n", "2", "--workers.cpus", "2"]
    with run.running("pretrain", *train) as driver:
        commits = Path(place["runs"], "s1", "checkpoints")
        until(lambda: list(commits.glob("*/manifest.json")), driver)
        children = psutil.Process(scaler.pid).children(recursive=True)
        next(p for p in children if "RayTrainWorker" in title(p)).parent().kill()  # the raylet: a node
        assert driver.wait(600) == 0, run.output()[-3000:]
    assert "2 worker(s) need 4 CPUs, the cluster has 0: waiting for more nodes" in run.output()
    assert run.output().count("lost workers or controller, resuming from the last checkpoint") == 1
    assert counts.most("pretrain", "gpu8") == 2
    run.until_empty()

    counts.stage = "serve"
    url = deploy(dashboard, storage.join(place["runs"], "s1", "release"))
    until_true(lambda: answers(url + "/readyz"), 300)
    assert counts.now()["gpu1"] == 1
    counts.stage = "serve, under load"
    with load(url):
        until_true(lambda: counts.now()["gpu1"] == 2, 300)
    counts.stage = "serve, nobody asks"
    until_true(lambda: counts.now()["gpu1"] == 1, 300)
    counts.stage = "serve is stopped"
    request("DELETE", f"http://127.0.0.1:{dashboard}/api/serve/applications/")
    run.until_empty()
    counts.over.set()

    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "nodes.md").write_text(counts.table() + "\n")


class Run:
    """Jobs against the cluster, as users start them."""

    def __init__(self, scaler: Autoscaler, counts: Counts, folder: Path):
        self.counts, self.log = counts, folder / "jobs.log"
        self.env = {**os.environ, "RAY_ADDRESS": scaler.address}

    @contextmanager
    def running(self, name: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        self.counts.stage = name
        command = [sys.executable, f"jobs/{name}.py", *words]
        with open(self.log, "ab") as log:
            driver = subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()

    def job(self, name: str, *words: str) -> None:
        with self.running(name, *words) as driver:
            assert driver.wait(600) == 0, self.output()[-3000:]

    def output(self) -> str:
        return self.log.read_text()

    def until_empty(self) -> None:
        self.counts.stage = f"after {self.counts.stage}"
        until_true(lambda: sum(self.counts.now().values()) == 0, 240)


def until_true(reached: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def deploy(dashboard: int, release: str) -> str:
    """What `serve deploy` does: our application on one to two replicas, each of which wants a GPU."""
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "look_back_period_s": 2}
    scaling |= {"upscale_delay_s": 1, "downscale_delay_s": 5}
    port = free_port()
    application = {
        **{"name": "igpt", "route_prefix": "/", "import_path": "igpt_ray.flows.serve:build"},
        "args": {"release": [f"s1={release}"], "open": True, "gpus": 1},
        "deployments": [{"name": "release-s1", "autoscaling_config": scaling}],
        "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
    }
    served = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    request("PUT", f"http://127.0.0.1:{dashboard}/api/serve/applications/", served)
    return f"http://127.0.0.1:{port}"


def request(method: str, url: str, body: Any = None) -> bytes:
    data = json.dumps(body).encode() if body is not None else None
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(asked, timeout=120) as answer:
        return bytes(answer.read())


def answers(url: str) -> bool:
    with suppress(OSError):
        request("GET", url)
        return True
    return False


@contextmanager
def load(url: str) -> Iterator[None]:
    """Six who ask again as soon as they are answered."""
    picture = base64.b64encode(images.png(np.zeros((8, 8, 3), np.uint8))).decode()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            with suppress(OSError):
                request("POST", f"{url}/v1/completions", {"image": picture, "n": 16})

    askers = [threading.Thread(target=ask, daemon=True) for _ in range(6)]
    for asker in askers:
        asker.start()
    try:
        yield
    finally:
        over.set()
        for asker in askers:
            asker.join(60)
