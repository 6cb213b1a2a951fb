"""A training run that loses workers, nodes, its controller, its driver: the same bits in the end.

`python jobs/pretrain.py` runs against a cluster of several raylets, whose processes and nodes are killed, stopped,
drained and added. What needs no cluster is in test_training.py, test_checkpoint.py, test_faults.py and
test_full_disk.py.
"""

import itertools
import json
import os
import random
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import free_port, tiny_store
from metadata import Metadata
from raylets import Autoscaler, autoscaled, children, title, until

from igpt_ray import storage
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat
from igpt_ray.train import checkpoint, metrics

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 200, 5
WORKER, CONTROLLER, CLEANER = "RayTrainWorker", "TrainController", "PlacementGroupCleaner"
LOST = "lost workers or controller, resuming from the last checkpoint"
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}

Nodes = Any
"""A `ray.cluster_utils.Cluster`."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head without CPUs and three nodes with one each: two workers need two of them. Lost ones are replaced."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    complete(cluster)
    yield cluster
    cluster.shutdown()


@pytest.fixture(autouse=True)
def complete_again(nodes: Nodes) -> None:
    complete(nodes)


def complete(nodes: Nodes) -> None:
    while len(nodes.worker_nodes) < 3:
        nodes.add_node(**NODE, dashboard_agent_listen_port=free_port())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, palette: Palette, kind: TokenFormat) -> str:
    return tiny_store(str(tmp_path_factory.mktemp("tokens")), palette, kind).root


class Training:
    """A run in a process of its own, `jobs/pretrain.py`, and what the cluster holds of it."""

    def __init__(self, nodes: Nodes, tokens: str, folder: Path, *words: str):
        self.nodes, self.log = nodes, folder / "log"
        self.name = f"killed-{secrets.token_hex(4)}"
        self.run = str(folder / self.name)
        self.command = [
            *(sys.executable, "jobs/pretrain.py", "tiny", "--data.tokens", tokens),
            *("--model.n-layer", "2", "--model.n-embd", "32", "--model.n-head", "2", "--model.n-px", "4"),
            *("--model.n-vocab", "16", "--optim.batch-size", "9", "--optim.steps", str(STEPS)),
            *("--optim.warmup-steps", "4", "--optim.lr", "3e-4", "--workers.n", "2", "--workers.micro-batch", "2"),
            *("--run.root", str(folder), "--run.name", self.name),
            *("--run.checkpoint-every", str(EVERY), "--run.log-every", str(EVERY), *words),
        ]

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        env = {**os.environ, "RAY_ADDRESS": self.nodes.address, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
        env["RAY_DEDUP_LOGS"] = "0"  # lines are counted
        with open(self.log, "ab") as log:
            driver = subprocess.Popen(self.command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()

    def finish(self, driver: subprocess.Popen[bytes]) -> dict[int, float]:
        """The losses of a run that has ended well."""
        assert driver.wait(500) == 0, self.output()[-3000:]
        return {line["step"]: line["nats_per_token"] for line in metrics.read(self.run)}

    def output(self) -> str:
        return self.log.read_text()

    def committed(self) -> int:
        return max(checkpoint.committed_steps(self.run), default=0)

    def weights(self) -> bytes:
        return storage.read(storage.join(self.run, "release", "model.safetensors"))

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of this cluster alone: other clusters may run on this machine."""
        found = []
        for node in [self.nodes.head_node, *self.nodes.worker_nodes]:
            found += [child for child in children(node) if name in title(child)]
        return found

    def node_of_a_worker(self) -> Any:
        return next(n for n in self.nodes.worker_nodes if any(WORKER in title(child) for child in children(n)))


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, tokens: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[int, float]]:
    """Weights and losses of a run on two workers."""
    run = Training(nodes, tokens, tmp_path_factory.mktemp("undisturbed"))
    with run.running() as driver:
        losses = run.finish(driver)
    assert list(losses) == list(range(EVERY, STEPS + 1, EVERY))
    return run.weights(), losses


@pytest.mark.parametrize("victim", [WORKER, pytest.param(CONTROLLER, marks=pytest.mark.slow)])
def test_a_run_with_killed_processes_ends_with_equal_weights(
    nodes: Nodes, tokens: str, tmp_path: Path, undisturbed: tuple[bytes, dict[int, float]], victim: str
) -> None:
    """SIGKILL of a training worker, or of what watches over them; the run goes on from its last checkpoint."""
    run = Training(nodes, tokens, tmp_path)
    with run.running() as driver:
        until(lambda: run.committed() >= 50, driver)
        run.processes(victim)[-1].kill()
        losses = run.finish(driver)
    assert run.output().count(LOST) == 1
    assert (run.weights(), losses) == undisturbed


@pytest.mark.slow
def test_a_lost_controller_releases_its_resources(
    nodes: Nodes, tokens: str, tmp_path: Path, undisturbed: tuple[bytes, dict[int, float]]
) -> None:
    """Two of three CPUs are its workers': nobody else would ever give them back, and the run would wait for them."""
    run = Training(nodes, tokens, tmp_path)
    with run.running() as driver:
        until(lambda: run.committed() >= 50, driver)
        for process in [*run.processes(CLEANER), run.processes(CONTROLLER)[-1]]:  # it ends early beside other clusters
            process.kill()
        losses = run.finish(driver)
    assert run.output().count(LOST) == 1
    assert (run.weights(), losses) == undisturbed


@pytest.mark.slow
def test_a_run_killed_during_a_checkpoint_ends_with_equal_weights(
    nodes: Nodes, tokens: str, tmp_path: Path, undisturbed: tuple[bytes, dict[int, float]]
) -> None:
    """SIGKILL of a worker when a file of a checkpoint is there and its manifest is not."""
    run = Training(nodes, tokens, tmp_path)
    with run.running() as driver:
        until(lambda: run.committed() >= 50, driver)
        workers = run.processes(WORKER)
        until(lambda: stopped_while_saving(run, workers), driver)
        workers[0].kill()
        workers[1].resume()
        losses = run.finish(driver)
    assert run.output().count(LOST) == 1
    assert (run.weights(), losses) == undisturbed


def stopped_while_saving(run: Training, workers: list[psutil.Process]) -> bool:
    """Whether a checkpoint is there in part, and will stay so: if so, the workers stand still."""
    if not saving(run):
        return False
    for worker in workers:
        worker.suspend()
    if saving(run):
        return True
    for worker in workers:
        worker.resume()
    return False


def saving(run: Training) -> bool:
    """Whether there is a file of the checkpoint after the newest that has a manifest."""
    return any(Path(checkpoint.uri_of(run.run, run.committed() + EVERY)).glob("*.distcp"))


@pytest.mark.slow
def test_a_run_that_loses_a_node_ends_with_equal_weights(
    nodes: Nodes, tokens: str, tmp_path: Path, undisturbed: tuple[bytes, dict[int, float]]
) -> None:
    """A raylet with all that runs on it, without notice."""
    run = Training(nodes, tokens, tmp_path)
    with run.running() as driver:
        until(lambda: run.committed() >= 50, driver)
        nodes.remove_node(run.node_of_a_worker(), allow_graceful=False)
        losses = run.finish(driver)
    assert run.output().count(LOST) == 1
    assert (run.weights(), losses) == undisturbed


@pytest.mark.slow
def test_a_run_with_a_killed_driver_resumes_when_the_command_is_repeated(
    nodes: Nodes, tokens: str, tmp_path: Path, undisturbed: tuple[bytes, dict[int, float]]
) -> None:
    """Nothing that the driver knew may be needed, nor what Ray Train knew, whose snapshots are torn as well."""
    run = Training(nodes, tokens, tmp_path)
    with run.running() as driver:
        until(lambda: run.committed() >= 50, driver)
        driver.kill()
    books = list(Path(tempfile.gettempdir(), f"igpt_ray-train-{os.getuid()}").glob(f"{run.name}-*"))
    assert books
    for folder in books:
        (folder / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_results": [')
    with run.running() as driver:
        losses = run.finish(driver)
    assert run.output().count("started from step 0") == 1
    assert "resumed from step" in run.output()
    assert (run.weights(), losses) == undisturbed


@pytest.mark.slow
def test_a_run_with_a_hanging_worker_ends_with_equal_weights(
    nodes: Nodes, tokens: str, tmp_path: Path, undisturbed: tuple[bytes, dict[int, float]]
) -> None:
    """SIGSTOP: the process is there, its connections too, and the others wait."""
    run = Training(nodes, tokens, tmp_path, "--workers.collective-timeout-s", "5")
    with run.running() as driver:
        until(lambda: run.committed() >= 50, driver)
        stopped = run.processes(WORKER)[-1]
        stopped.suspend()
        losses = run.finish(driver)
    assert run.output().count(LOST) == 1
    assert not stopped.is_running()
    assert (run.weights(), losses) == undisturbed


@pytest.mark.slow
def test_a_run_on_a_draining_node_saves_in_time_and_resumes_elsewhere(
    nodes: Nodes, tokens: str, tmp_path: Path, undisturbed: tuple[bytes, dict[int, float]]
) -> None:
    """A spot instance called back: no step is done twice, and the node is empty before it goes."""
    run = Training(nodes, tokens, tmp_path)
    with run.running() as driver:
        until(lambda: run.committed() >= 50, driver)
        node = run.node_of_a_worker()
        drain(nodes, node, 60)
        losses = run.finish(driver)
    assert re.search(r"1 node\(s\) are preempted in \d\d s: saving", run.output())
    assert LOST not in run.output()
    (resumed,) = re.findall(r"resumed from step (\d+)", run.output())
    assert losses.keys() == undisturbed[1].keys() | {int(resumed)}  # saved where the notice came, which has a line
    assert not [child for child in children(node) if WORKER in title(child)]
    nodes.remove_node(node)
    assert run.weights() == undisturbed[0]


@pytest.mark.slow
def test_a_preemption_notice_drains_the_node_and_the_run_ends_with_equal_weights(
    nodes: Nodes, tokens: str, tmp_path: Path, undisturbed: tuple[bytes, dict[int, float]], metadata: Metadata
) -> None:
    """From what AWS says on the node to the end of the run: no step is done twice, no worker is lost."""
    run = Training(nodes, tokens, tmp_path)
    with run.running() as driver:
        until(lambda: run.committed() >= 25, driver)
        node = run.node_of_a_worker()
        words = ["--cloud", "aws", "--address", nodes.address, "--node", node.node_id, "--metadata", metadata.url]
        command = [sys.executable, "jobs/watch.py", *words, "--every", "0.2"]
        watcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(1)
        end = datetime.now(UTC) + timedelta(seconds=120)
        action = json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")})
        metadata.said["/latest/meta-data/spot/instance-action"] = action
        out, err = watcher.communicate(timeout=120)
        losses = run.finish(driver)
    report = json.loads(out)
    assert report["accepted"], err
    assert report["node"] == node.node_id
    assert f"spot terminate: draining node {node.node_id}" in err
    assert "1 node(s) are preempted in" in run.output()
    assert LOST not in run.output()
    (resumed,) = re.findall(r"resumed from step (\d+)", run.output())
    assert losses.keys() == undisturbed[1].keys() | {int(resumed)}
    assert not [child for child in children(node) if WORKER in title(child)]
    nodes.remove_node(node)
    assert run.weights() == undisturbed[0]


@pytest.mark.slow
def test_a_run_shrinks_and_grows_with_its_nodes(
    nodes: Nodes, tokens: str, tmp_path: Path, undisturbed: tuple[bytes, dict[int, float]]
) -> None:
    """Three workers, two, three: the same images in every batch, so the same losses but for the order of sums."""
    run = Training(nodes, tokens, tmp_path, "--workers.n", "3", "--workers.min-n", "1", "--workers.grow-after", "1")
    with run.running() as driver:
        until(lambda: run.committed() >= 25, driver)
        nodes.remove_node(run.node_of_a_worker(), allow_graceful=False)
        until(lambda: "on 2 worker(s)" in run.output(), driver)
        complete(nodes)
        losses = run.finish(driver)
    assert re.findall(r"(?:started|resumed) from step \d+ on (\d) worker", run.output()) == ["3", "2", "3"]
    assert "resources for 1 more worker(s): saving, then restarting with 3" in run.output()
    expected, elastic = summed(undisturbed[1]), summed(losses)
    assert {step: elastic[step] for step in expected} == pytest.approx(expected, rel=1e-5)


def summed(losses: dict[int, float]) -> dict[int, float]:
    """Nats per token times steps, up to each line: a run that saves between two lines has one more."""
    steps = [0, *losses]
    sums = itertools.accumulate((b - a) * losses[b] for a, b in itertools.pairwise(steps))
    return dict(zip(losses, sums, strict=True))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_weights_after_twenty_random_kills_are_equal(
    nodes: Nodes, tokens: str, tmp_path: Path, undisturbed: tuple[bytes, dict[int, float]]
) -> None:
    """A worker or the controller, at any moment of a step or a save, again and again in one run.

    Each kill waits for a new checkpoint of workers that were started since the last one, and so three failures in a
    row never come together.
    """
    rng = random.Random(5)
    run = Training(nodes, tokens, tmp_path)

    def further(kills: int, reached: int) -> bool:
        return run.output().count("resumed from step") == kills and run.committed() > reached

    with run.running() as driver:
        reached = 0
        for kills in range(20):
            until(partial(further, kills, reached), driver)
            victim = run.processes(rng.choice([WORKER, WORKER, CONTROLLER]))[-1]
            time.sleep(rng.uniform(0, 0.1))
            reached = run.committed()
            victim.kill()
        losses = run.finish(driver)
    assert run.output().count(LOST) == 20
    assert (run.weights(), losses) == undisturbed


def drain(nodes: Nodes, node: Any, seconds: int) -> None:
    """What an autoscaler does when a cloud announces that it takes a machine back."""
    words = ["--address", nodes.address, "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    words += ["--reason-message", "called back", "--deadline-remaining-seconds", str(seconds)]
    subprocess.run(["ray", "drain-node", *words], check=True, capture_output=True)


# ------------------------------------------------------------------------------------------------ an autoscaler


@pytest.fixture
def autoscaler(tmp_path: Path) -> Iterator[Autoscaler]:
    """Up to three nodes of one CPU."""
    cpu = {"resources": {"CPU": 1, "object_store_memory": 100 << 20}, "node_config": {}, "max_workers": 3}
    with autoscaled(tmp_path, {"cpu": cpu}) as found:
        yield found


@pytest.mark.slow
@pytest.mark.long
def test_a_run_waits_for_autoscaled_nodes_and_survives_the_loss_of_one(
    autoscaler: Autoscaler, tokens: str, tmp_path: Path, undisturbed: tuple[bytes, dict[int, float]]
) -> None:
    """From an empty cluster: two nodes come, one is killed, another comes."""
    run = Training(autoscaler, tokens, tmp_path, "--workers.min-n", "1", "--workers.grow-after", "1")

    def workers() -> list[tuple[str, str]]:
        return re.findall(r"(?:started|resumed) from step (\d+) on (\d) worker", run.output())

    def on_two() -> bool:
        return any(n == "2" and run.committed() >= int(step) + 2 * EVERY for step, n in workers()[-1:])

    with run.running() as driver:
        until(on_two, driver)
        worker = next(p for p in psutil.Process(autoscaler.pid).children(recursive=True) if WORKER in title(p))
        worker.parent().kill()  # the raylet: a node
        losses = run.finish(driver)
    said = run.output()
    assert "1 worker(s) need 1 CPUs, the cluster has 0: waiting for more nodes" in said
    assert workers()[-1][1] == "2"
    assert said.count(LOST) == 1
    expected, elastic = summed(undisturbed[1]), summed(losses)
    assert {step: elastic[step] for step in expected} == pytest.approx(expected, rel=1e-5)
