"""Training with Ray Train: the same code on one CPU and on many GPUs.

`pretrain` runs on the driver. It validates the settings, lets Ray Train start the workers, and restarts from the newest
valid checkpoint when workers fail, and when they have saved because a node is being preempted or more workers can
start. The training loop is `train/loop.py`. All state is in the run's folder; Ray Train's own storage is not used.
"""

import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
import ray.train
from pydantic import ConfigDict
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.metrics import Gauge
from ray.util.placement_group import PlacementGroup

from igpt_ray import storage
from igpt_ray.data.token_store import TokenStore
from igpt_ray.device import device_of
from igpt_ray.errors import CheckpointError, SettingError
from igpt_ray.flows import run_status
from igpt_ray.flows.job import log_to_stderr, user_error
from igpt_ray.flows.ray_compat import remove_placement_groups_of
from igpt_ray.interrupt import run_interruptible
from igpt_ray.model.config import ModelConfig
from igpt_ray.provenance import provenance
from igpt_ray.settings import Result
from igpt_ray.train import checkpoint, loop, metrics, monitor
from igpt_ray.train.config import FinetuneRunConfig, OptimConfig, PretrainConfig, WorkersConfig

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
"""Seconds between polls of the cluster's state."""
STABLE_POLLS = 5
"""Polls without a change after which the number of available workers counts as stable."""


class TrainResult(Result):
    """Also has the last line of metrics as fields: `nats_per_token`, `tokens_per_second` etc. (docs/training.md)."""

    model_config = ConfigDict(extra="allow")

    run: str
    """URI of the run's folder."""
    release: str
    """URI of the release."""
    n_params: int
    step: int
    best_step: int | None = None
    """Step of the released weights, after early stopping."""
    val_accuracy: float | None = None
    """Held-out accuracy of the released weights, after early stopping; otherwise of the last evaluation."""


def pretrain(settings: PretrainConfig) -> TrainResult:
    """Train to the last step, write the release, return the last metrics. Resumes a run of the same name."""
    return fit(settings, check(settings))


def fit(settings: PretrainConfig, store: TokenStore, **identity: Any) -> TrainResult:
    """Train a run whose settings `check` has validated. `identity` is compared at resume, as the settings are."""
    settings = settings.resolved(on_gpu=settings.workers.gpus > 0, started=_workers_at_start(settings.run.uri))
    _warn_if_slow(settings.workers)
    _write_or_check_config(settings, store, identity)
    if isinstance(settings.run.resume, int):
        checkpoint.rewind(settings.run.uri, settings.run.resume)
    _warn_if_short(settings.workers)
    status = run_status.create()
    bar = run_status.Bar(settings.run.name, settings.optim.steps, status)
    failures, report = 0, dict[str, Any](stopped_at=0)
    while "stopped_at" in report:
        before = checkpoint.committed_steps(settings.run.uri)
        try:
            trainer = _trainer(settings, _available_workers(settings.workers), status, bar.shown)
            result, interrupt = run_interruptible(trainer.fit, partial(run_status.request_stop, status), bar.update)
            report = result.return_value
            if interrupt is not None and "stopped_at" in report:
                saved = f"step {report['stopped_at']} is saved, the same command resumes the run"
                raise type(interrupt)(saved) from None
        except (ray.train.TrainingFailedError, RayActorError) as error:  # lost workers or controller
            if known := user_error(error):
                raise known from error
            progressed = checkpoint.committed_steps(settings.run.uri)[-1:] > before[-1:]
            failures = 1 if progressed else failures + 1
            if failures > settings.workers.max_failures:
                raise
            log.warning("lost workers or controller, resuming from the last checkpoint: %s", error)
            # Leftover placement groups would block new workers until the job ends. Ray Train does not track a group
            # until its workers have started, and the controller that removes them may have died.
            remove_placement_groups_of("TrainController")
    bar.close()
    return TrainResult(**report)


def _trainer(settings: PretrainConfig, n: int, status: Any, bar: bool) -> TorchTrainer:
    w = settings.workers
    # -1: Ray waits without limit for workers that cannot start. 0: it fails, and we start with fewer workers.
    limit = -1 if w.min_workers == w.n else 0
    return TorchTrainer(
        train_worker,
        train_loop_config={"settings": settings.model_dump(mode="json"), "status": status, "bar": bar},
        torch_config=_TorchConfig(timeout_s=w.collective_timeout_s),
        scaling_config=ray.train.ScalingConfig(num_workers=n, use_gpu=w.gpus > 0, resources_per_worker=_resources(w)),
        # A unique name in a temporary folder, because nothing is reported to Ray Train.
        run_config=ray.train.RunConfig(
            name=f"{settings.run.name}-{uuid.uuid4().hex[:8]}",
            storage_path=f"{tempfile.gettempdir()}/igpt_ray-train-{os.getuid()}",
            failure_config=ray.train.FailureConfig(controller_failure_limit=limit),
        ),
    )


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's, after a check that torch can use the requested GPUs. NCCL's own error would not name the reason."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(device_of, worker_group.get_resources_per_worker().get("GPU", 0))
        super().on_start(worker_group, backend_config)


class _TorchConfig(TorchConfig):  # type: ignore[misc]
    backend_cls = _Backend


def _resources(workers: WorkersConfig) -> dict[str, float]:
    return {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})


def _available_workers(workers: WorkersConfig) -> int:
    """Number of workers to start: n, or as many as fit once at least `min_workers` fit.

    We reserve placement groups, because Ray's elastic policy counts reported node resources, which include busy and
    draining nodes, and for up to three minutes the reservations of a lost controller.
    """
    if workers.min_workers == workers.n:
        return workers.n
    _release_reservations(workers)  # of a worker that was killed
    reservations = [_reserve(workers, i) for i in range(workers.n)]
    n, stable_polls = 0, 0
    while n < workers.n and (n < workers.min_workers or stable_polls < STABLE_POLLS):
        time.sleep(POLL_INTERVAL_S)
        before, n = n, sum(map(_is_available, reservations))
        stable_polls = stable_polls + 1 if n == before else 0
    _release_reservations(workers)
    return n


def _reserve(workers: WorkersConfig, i: int) -> PlacementGroup:
    """Reserve the resources of one worker. A pending reservation makes an autoscaler add nodes."""
    return placement_group([_resources(workers)], name=f"reservation-{i}")


def _is_available(reservation: PlacementGroup) -> bool:
    return bool(placement_group_table(reservation)["state"] == "CREATED")


def _release_reservations(workers: WorkersConfig) -> None:
    """Remove all reservations, which would otherwise last until the job ends."""
    for i in range(workers.n):
        with suppress(ValueError):  # no reservation has that name
            remove_placement_group(get_placement_group(f"reservation-{i}"))


def _warn_if_short(workers: WorkersConfig) -> None:
    """Warn if the cluster lacks resources, because Ray waits for them without a message."""
    existing, n = ray.cluster_resources(), workers.min_workers
    for name, each in _resources(workers).items():
        if n * each > existing.get(name, 0):
            log.warning(
                "%d worker(s) need %g %ss, the cluster has %g: waiting for more nodes",
                *(n, n * each, name, existing.get(name, 0)),
            )


def _warn_if_slow(workers: WorkersConfig) -> None:
    if workers.gpus and (workers.precision, workers.float32_matmul) == ("float32", "highest"):
        log.warning(
            "float32 products do not use a GPU's tensor cores and take several times as long:"
            " --workers.precision bfloat16 or --workers.float32-matmul high"
        )


def check(settings: PretrainConfig) -> TokenStore:
    """Validate the settings against the token store, before workers start. Raises `SettingError`."""
    if not settings.data.tokens:
        raise SettingError("--data.tokens is not set: name the token store that `igpt prepare` wrote")
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
        raise SettingError("--run.sample-every needs --model.objective next: a masked model cannot generate")
    store.palette()
    for field in ("n_px", "n_vocab"):
        ours, theirs = getattr(settings.model, field), getattr(store.kind, field)
        if ours != theirs:
            raise SettingError(
                f"model.{field} is {ours}, but the tokens at {store.root} have {field} {theirs}: train with"
                f" --model.{field.replace('_', '-')} {theirs}, or prepare others"
            )
    return store


def _write_or_check_config(settings: PretrainConfig, store: TokenStore, more: dict[str, Any] | None = None) -> None:
    """Write the run's config.json, or compare it with the config.json of an existing run.

    The settings of a run without a checkpoint may still change. Raises `CheckpointError` if the settings differ.
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
            f"the run at {settings.run.uri} has checkpoints up to step {committed[-1]}, which --run.resume never does"
            " not overwrite: choose another --run.name, or omit --run.resume to resume the run"
        )
    uri = storage.join(settings.run.uri, "config.json")
    data = json.dumps({"identity": identity, **provenance(settings)}, indent=1).encode()
    if storage.write_new(uri, data):
        return
    if not committed:
        storage.write(uri, data)
        return
    existing = json.loads(storage.read(uri))["identity"]
    existing["optim"] = _with_schedule(existing["optim"])
    for name, section in (("model", ModelConfig()), ("optim", OptimConfig())):
        existing[name] = section.model_dump(mode="json") | existing[name]  # defaults of newer settings
    if differing := sorted(_differences(existing, identity)):
        raise CheckpointError(
            f"the run at {settings.run.uri} was started with other settings ({'; '.join(differing)}):"
            " use those to resume it, or choose another --run.name"
        )


def _workers_at_start(run: str) -> dict[str, Any] | None:
    """The settings of the workers in a run's config.json; None for a run without a checkpoint."""
    if not checkpoint.committed_steps(run):
        return None
    workers: dict[str, Any] = json.loads(storage.read(storage.join(run, "config.json")))["settings"]["workers"]
    return workers | ({"micro_batch": "auto"} if workers.get("micro_batch") == 0 else {})  # before version 0.2


def _with_schedule(optim: dict[str, Any]) -> dict[str, Any]:
    """The optimiser's settings of a run before version 0.2, whose `cooldown` is now `schedule` and `decay_fraction`."""
    rest = {name: value for name, value in optim.items() if name != "cooldown"}
    if (cooldown := optim.get("cooldown")) is None:
        return rest
    decay = {"schedule": "warmup_stable_decay", "decay_fraction": cooldown}
    return rest | (decay if cooldown else {"schedule": "constant"})


def _differences(existing: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    differences = []
    for key in existing.keys() | here.keys():
        a, b = existing.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            differences += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            differences.append(f"{prefix}{key} was {a}, now {b}")
    return differences


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train calls on every worker."""
    settings = config["settings"]
    log_to_stderr()
    logging.getLogger("igpt_ray").propagate = False  # Ray Train's handler would print every line a second time
    kind = FinetuneRunConfig if "tune" in settings else PretrainConfig
    cfg = kind.model_validate(settings)
    should_stop = threading.Event()
    threading.Thread(target=_watch_resources, args=(cfg.workers, config["status"], should_stop), daemon=True).start()
    export = _gauges(cfg.run.name)

    def on_metrics(line: metrics.Line) -> None:
        export(line)
        config["status"].report.remote(line)

    if config["bar"]:
        logging.getLogger(monitor.__name__).setLevel(logging.WARNING)
    return loop.train(cfg, device_of(cfg.workers.gpus), should_stop.is_set, on_metrics)


def _gauges(run: str) -> Callable[[metrics.Line], None]:
    """A function that exports a line of metrics as Prometheus gauges of this node, `ray_igpt_nats_per_token` etc."""
    gauges: dict[str, Gauge] = {}

    def on_metrics(line: metrics.Line) -> None:
        for name in line.keys() - {"time"}:
            if name not in gauges:
                gauges[name] = Gauge(f"igpt_{name}", f"{name} of the run's metrics", ("run",))
            gauges[name].set(line[name], {"run": run})

    return on_metrics


def _watch_resources(workers: WorkersConfig, status: Any, should_stop: threading.Event) -> None:
    """Set `should_stop` when a node of the group is being preempted and, on rank 0, when the driver is interrupted or
    more workers can start.

    Runs in a thread, because get_preemption_info() is a collective call. Ray Train's own resize would kill the workers
    without saving. Resources for more workers are reserved only after the current workers have theirs.
    """
    context, started = ray.train.get_context(), time.monotonic()
    n, is_rank_0 = context.get_world_size(), context.get_world_rank() == 0
    reservations: list[PlacementGroup] = []
    while not should_stop.wait(POLL_INTERVAL_S):
        notice = ray.train.get_preemption_info()
        if notice is not None:
            if is_rank_0:
                when = f"in {notice.deadline_ms / 1000 - time.time():.0f} s" if notice.deadline_ms else "soon"
                log.warning(
                    "%d node(s) are preempted %s: saving, then restarting", len(notice.preempted_node_ids), when
                )
            should_stop.set()
        elif is_rank_0 and run_status.stop_requested(status):
            should_stop.set()
        elif is_rank_0 and time.monotonic() - started > workers.grow_after:
            reservations = reservations or [_reserve(workers, i) for i in range(workers.n - n)]
            if free := sum(map(_is_available, reservations)):
                log.info("resources for %d more worker(s): saving, then restarting with %d", free, n + free)
                should_stop.set()
