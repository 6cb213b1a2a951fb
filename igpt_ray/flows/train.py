"""Training with Ray Train: the same code on one CPU and on many GPUs.

`pretrain` runs on the driver: it checks everything that can be checked before workers start, lets Ray Train start
them, and starts again from the newest verified checkpoint when they are lost. The loop is in `training.py`.
State lives in the run's folder (`checkpoint.py`, `metrics.py`); Ray's own bookkeeping is thrown away.
"""

import itertools
import json
import logging
import tempfile
import time
import uuid
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from igpt_ray import checkpoint, config, storage, training
from igpt_ray.errors import CheckpointError, SettingError
from igpt_ray.flows.job import log_to_stderr, mendable
from igpt_ray.shards import TokenStore

log = logging.getLogger(__name__)


def pretrain(settings: config.Pretrain) -> dict[str, Any]:
    """Train to the last step, write the release, return the last metrics. Resumes a run of the same name."""
    return fit(settings, check(settings))


def fit(settings: config.Pretrain, store: TokenStore, **identity: Any) -> dict[str, Any]:
    """Train a run whose settings were checked; `identity` is what else makes it this one."""
    started = time.perf_counter()
    _claim(settings, store, identity)
    if isinstance(settings.run.resume, int):
        checkpoint.rewind(settings.run.uri, settings.run.resume)
    _say_if_short(settings.workers)
    for attempt in itertools.count(1):
        try:
            result = _trainer(settings).fit()
            break
        except (TrainingFailedError, RayActorError) as error:  # a worker was lost, or the controller itself
            if known := mendable(error):
                raise known from error
            if attempt > settings.workers.max_failures:
                raise
            log.warning("attempt %d lost workers or controller, going on from the last checkpoint: %s", attempt, error)
    return {**result.return_value, "seconds": round(time.perf_counter() - started, 2)}


def _trainer(settings: config.Pretrain) -> TorchTrainer:
    w = settings.workers
    resources = {"CPU": w.cpus} | ({"GPU": w.gpus} if w.gpus else {})
    return TorchTrainer(
        train_worker,
        train_loop_config=settings.model_dump(mode="json"),
        scaling_config=ray.train.ScalingConfig(num_workers=w.n, use_gpu=w.gpus > 0, resources_per_worker=resources),
        # A fresh name in a scratch folder: nothing is reported to Ray, so nothing of it needs to be kept or found.
        run_config=ray.train.RunConfig(
            name=f"{settings.run.name}-{uuid.uuid4().hex[:8]}", storage_path=tempfile.gettempdir() + "/igpt_ray-train"
        ),
    )


def _say_if_short(workers: config.Workers) -> None:
    """Ray waits for room without a word; an autoscaler may be making it, or nobody is."""
    there = ray.cluster_resources()
    for name, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        if workers.n * each > there.get(name, 0):
            log.warning(
                "%d worker(s) ask for %g %ss, the cluster has %g: waiting for it to grow",
                *(workers.n, workers.n * each, name, there.get(name, 0)),
            )


def check(settings: config.Pretrain) -> TokenStore:
    """What would fail on the workers, found before they start."""
    if not settings.data.tokens:
        raise SettingError("--data.tokens is not set: give the token store that jobs/prepare.py wrote")
    if settings.model.n_class and not isinstance(settings, config.Tuning):
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


def _claim(settings: config.Pretrain, store: TokenStore, more: dict[str, Any] | None = None) -> None:
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
    data = json.dumps({"identity": identity, **config.provenance(settings)}, indent=1).encode()
    if storage.write_new(uri, data):
        return
    there = json.loads(storage.read(uri))["identity"]
    for name, section in (("model", config.Model()), ("optim", config.Optim())):
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
    kind = config.Tuning if "tune" in settings else config.Pretrain
    return training.train(kind.model_validate(settings), ray.train.torch.get_device())
