"""Training with Ray Train: the same code on one CPU and on many GPUs.

`pretrain` runs on the driver: it checks everything that can be checked before workers start, lets Ray Train start
them, and starts again from the newest verified checkpoint when they are lost, or when they have saved and left: before
the node of one goes, or because there is room for more of them. The loop is in `loop.py`. State lives in the run's
folder (`checkpoint.py`, `metrics.py`); Ray's own bookkeeping is thrown away.
"""

import json
import logging
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import ray._private.state
import ray.train
from ray import PlacementGroupID
from ray.core.generated import gcs_pb2
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.metrics import Gauge
from ray.util.placement_group import PlacementGroup

from igpt_ray import storage
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import CheckpointError, SettingError
from igpt_ray.flows.job import log_to_stderr, user_error
from igpt_ray.model.config import ModelConfig
from igpt_ray.provenance import provenance
from igpt_ray.train import checkpoint, loop, metrics
from igpt_ray.train.config import FinetuneRunConfig, OptimConfig, PretrainConfig, WorkersConfig

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0
"""Seconds between looks at what the cluster has to tell."""
SETTLED = 5
"""Looks without a change after which there is as much room as there is for now."""


def pretrain(settings: PretrainConfig) -> dict[str, Any]:
    """Train to the last step, write the release, return the last metrics. Resumes a run of the same name."""
    return fit(settings, check(settings))


def fit(settings: PretrainConfig, store: TokenStore, **identity: Any) -> dict[str, Any]:
    """Train a run whose settings were checked; `identity` is what else makes it this one."""
    started = time.perf_counter()
    _claim(settings, store, identity)
    if isinstance(settings.run.resume, int):
        checkpoint.rewind(settings.run.uri, settings.run.resume)
    _say_if_short(settings.workers)
    failures, report = 0, {"left": 0}
    while "left" in report:
        before = checkpoint.committed_steps(settings.run.uri)
        try:
            report = _trainer(settings, _n_that_fit(settings.workers)).fit().return_value
        except (TrainingFailedError, RayActorError) as error:  # a worker was lost, or the controller itself
            if known := user_error(error):
                raise known from error
            failures = 1 if checkpoint.committed_steps(settings.run.uri)[-1:] > before[-1:] else failures + 1
            if failures > settings.workers.max_failures:
                raise
            log.warning("lost workers or controller, going on from the last checkpoint: %s", error)
            _clear_after_controllers()
    return {**report, "seconds": round(time.perf_counter() - started, 2)}


def _trainer(settings: PretrainConfig, n: int) -> TorchTrainer:
    w = settings.workers
    # Ray waits for the room of a worker that cannot start, for ever or, where fewer will do, until we look again.
    limit = -1 if w.min_workers == w.n else 0
    return TorchTrainer(
        train_worker,
        train_loop_config=settings.model_dump(mode="json"),
        torch_config=TorchConfig(timeout_s=w.collective_timeout_s),
        scaling_config=ray.train.ScalingConfig(num_workers=n, use_gpu=w.gpus > 0, resources_per_worker=_resources(w)),
        # A fresh name in a scratch folder: nothing is reported to Ray, so nothing of it needs to be kept or found.
        run_config=ray.train.RunConfig(
            name=f"{settings.run.name}-{uuid.uuid4().hex[:8]}",
            storage_path=tempfile.gettempdir() + "/igpt_ray-train",
            failure_config=ray.train.FailureConfig(controller_failure_limit=limit),
        ),
    )


def _resources(workers: WorkersConfig) -> dict[str, float]:
    return {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})


def _n_that_fit(workers: WorkersConfig) -> int:
    """With how many workers to start: all, or what there is room for once there is room for the fewest.

    Ray's own elastic policy counts what nodes have, also of those that are busy or being drained, and up to three
    minutes after a lost controller what that one had asked for. Seats are real.
    """
    if workers.min_workers == workers.n:
        return workers.n
    _clear(workers)  # those of a worker that was killed while it held them
    seats = [_seat(workers, i) for i in range(workers.n)]
    n, looks = 0, 0
    while n < workers.n and (n < workers.min_workers or looks < SETTLED):
        time.sleep(LOOK_EVERY)
        before, n = n, sum(map(_free, seats))
        looks = looks + 1 if n == before else 0
    _clear(workers)
    return n


def _seat(workers: WorkersConfig, i: int) -> PlacementGroup:
    """Room for one more worker: held where it is found; where it is not, an autoscaler makes it."""
    return placement_group([_resources(workers)], name=f"seat-{i}")


def _free(seat: PlacementGroup) -> bool:
    return bool(placement_group_table(seat)["state"] == "CREATED")


def _clear(workers: WorkersConfig) -> None:
    """Give up all seats: they outlive the worker that asked for them, and end with the job."""
    for i in range(workers.n):
        with suppress(ValueError):  # there is none of that name
            remove_placement_group(get_placement_group(f"seat-{i}"))


def _clear_after_controllers() -> None:
    """Give up the room of workers whose controller was lost, or the next ones would wait for it until the job ends.

    Ray Train's own cleaner does not know it while the workers are being started, and may be lost too.
    """
    job, state = ray.get_runtime_context().get_job_id(), ray._private.state
    for data in state.state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(data)
        made_by = state.actors(group.creator_actor_id.hex()).get("ActorClassName")
        if made_by == "TrainController" and group.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def _say_if_short(workers: WorkersConfig) -> None:
    """Ray waits for room without a word; an autoscaler may be making it, or nobody is."""
    there, n = ray.cluster_resources(), workers.min_workers
    for name, each in _resources(workers).items():
        if n * each > there.get(name, 0):
            log.warning(
                "%d worker(s) ask for %g %ss, the cluster has %g: waiting for it to grow",
                *(n, n * each, name, there.get(name, 0)),
            )


def check(settings: PretrainConfig) -> TokenStore:
    """What would fail on the workers, found before they start."""
    if not settings.data.tokens:
        raise SettingError("--data.tokens is not set: give the token store that jobs/prepare.py wrote")
    if settings.model.n_class and not isinstance(settings, FinetuneRunConfig):
        raise SettingError("--model.n-class is for fine-tuning: pretraining reads no labels, leave it at 0")
    if settings.optim.batch_size < settings.workers.n:
        raise SettingError(f"batch_size {settings.optim.batch_size} is smaller than workers.n {settings.workers.n}")
    store = TokenStore.open(settings.data.tokens)
    store.manifest.select(settings.data.split)
    if settings.data.val_split:
        store.manifest.select(settings.data.val_split)
    elif settings.run.validate_every:
        raise SettingError("--run.validate-every needs --data.val-split: holdout, val or test of the token store")
    if settings.run.sample_every and settings.model.objective == "masked":
        raise SettingError("--run.sample-every finishes pictures, which a masked network cannot: leave it at 0")
    store.palette()
    for field in ("n_px", "n_vocab"):
        ours, theirs = getattr(settings.model, field), getattr(store.kind, field)
        if ours != theirs:
            raise SettingError(
                f"model.{field} is {ours}, but the tokens at {store.root} have {field} {theirs}: train with"
                f" --model.{field.replace('_', '-')} {theirs}, or prepare others"
            )
    return store


def _claim(settings: PretrainConfig, store: TokenStore, more: dict[str, Any] | None = None) -> None:
    """Write the run's config.json, or check that the run that is already there is this one.

    A run without a checkpoint has nothing to lose, so its settings may still be mended.
    """
    identity = {
        **settings.model_dump(mode="json", include={"model", "optim", "seed"}),
        "tokens": store.sha256,
        "split": settings.data.split,
        **(more or {}),
    }
    committed = checkpoint.committed_steps(settings.run.uri)
    if settings.run.resume == "never" and committed:
        raise CheckpointError(
            f"the run at {settings.run.uri} has checkpoints up to step {committed[-1]}, and --run.resume never does not"
            " train over them: choose another --run.name, or leave --run.resume out to go on from there"
        )
    uri = storage.join(settings.run.uri, "config.json")
    data = json.dumps({"identity": identity, **provenance(settings)}, indent=1).encode()
    if storage.write_new(uri, data):
        return
    there = json.loads(storage.read(uri))["identity"]
    for name, section in (("model", ModelConfig()), ("optim", OptimConfig())):
        there[name] = section.model_dump(mode="json") | there[name]  # a setting newer than the run had its default
    differing = sorted(_differences(there, identity))
    if differing and not committed:
        storage.write(uri, data)
    elif differing:
        raise CheckpointError(
            f"the run at {settings.run.uri} was started with other settings ({'; '.join(differing)}):"
            " repeat those to resume it, or choose another --run.name"
        )


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in there.keys() | here.keys():
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a}, now {b}")
    return found


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train calls on every worker."""
    log_to_stderr()
    logging.getLogger("igpt_ray").propagate = False  # Ray Train's own handler would say every line again
    kind = FinetuneRunConfig if "tune" in settings else PretrainConfig
    cfg = kind.model_validate(settings)
    leave = threading.Event()
    threading.Thread(target=_watch, args=(cfg.workers, leave), daemon=True).start()
    return loop.train(cfg, ray.train.torch.get_device(), leave.is_set, _gauges(cfg.run.name))


def _gauges(run: str) -> Callable[[metrics.Line], None]:
    """Every number of a line of metrics where Prometheus finds it, on this node: `ray_igpt_nats_per_token` ..."""
    gauges: dict[str, Gauge] = {}

    def on_metrics(line: metrics.Line) -> None:
        for name in line.keys() - {"time"}:
            if name not in gauges:
                gauges[name] = Gauge(f"igpt_{name}", f"{name} of metrics.jsonl", ("run",))
            gauges[name].set(line[name], {"run": run})

    return on_metrics


def _watch(workers: WorkersConfig, leave: threading.Event) -> None:
    """Tell this worker to leave when a node of the group is to go, or, on rank 0, when there is room for more workers.

    Beside the steps, because Ray answers all workers together. A resize of Ray's own would be no more than a kill.
    Seats are asked for here, when the workers have theirs.
    """
    context, started = ray.train.get_context(), time.monotonic()
    n, first = context.get_world_size(), context.get_world_rank() == 0
    seats: list[PlacementGroup] = []
    while not leave.wait(LOOK_EVERY):
        notice = ray.train.get_preemption_info()
        if notice is not None:
            if first:
                when = f"in {notice.deadline_ms / 1000 - time.time():.0f} s" if notice.deadline_ms else "soon"
                log.warning("%d node(s) will go %s: saving, to go on elsewhere", len(notice.preempted_node_ids), when)
            leave.set()
        elif first and time.monotonic() - started > workers.grow_after:
            seats = seats or [_seat(workers, i) for i in range(workers.n - n)]
            if free := sum(map(_free, seats)):
                log.info("room for %d more worker(s): saving, to go on with %d", free, n + free)
                leave.set()
