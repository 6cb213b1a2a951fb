"""Pretraining with Ray Train: the same code on one CPU and on many GPUs.

`pretrain` runs on the driver: it checks everything that can be checked before workers start, lets Ray Train start
them, and starts again from the newest verified checkpoint when they are lost. `train_worker` is the training loop.
State lives in the run's folder (`checkpoint.py`, `metrics.py`); Ray's own bookkeeping is thrown away.
"""

import itertools
import json
import logging
import math
import tempfile
import time
import uuid
from typing import Any, cast

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from igpt_ray import checkpoint, config, metrics, objectives, optim, parallel, storage, weights
from igpt_ray.errors import CheckpointError, SettingError, TrainingError
from igpt_ray.flows.job import log_to_stderr, mendable
from igpt_ray.loader import Batch, SplitCache, global_batch, share
from igpt_ray.model import ImageGPT
from igpt_ray.sampling import seed_of
from igpt_ray.shards import TokenStore

log = logging.getLogger(__name__)


def pretrain(settings: config.Pretrain) -> dict[str, Any]:
    """Train to the last step, write the release, return the last metrics. Resumes a run of the same name."""
    started = time.perf_counter()
    store = _check(settings)
    _claim(settings, store)
    _say_if_short(settings.workers)
    for attempt in itertools.count(1):
        try:
            result = _trainer(settings).fit()
            break
        except TrainingFailedError as error:
            if known := mendable(error):
                raise known from error
            if attempt > settings.workers.max_failures:
                raise
            log.warning("attempt %d lost its workers, starting again from the last checkpoint: %s", attempt, error)
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


def _check(settings: config.Pretrain) -> TokenStore:
    """What would fail on the workers, found before they start."""
    if not settings.data.tokens:
        raise SettingError("--data.tokens is not set: give the token store that jobs/prepare.py wrote")
    if settings.model.n_class:
        raise SettingError("--model.n-class is for fine-tuning: pretraining reads no labels, leave it at 0")
    if settings.optim.batch_size < settings.workers.n:
        raise SettingError(f"batch_size {settings.optim.batch_size} is smaller than workers.n {settings.workers.n}")
    store = TokenStore.open(settings.data.tokens)
    store.manifest.select(settings.data.split)
    store.palette()
    for field in ("n_px", "n_vocab"):
        ours, theirs = getattr(settings.model, field), getattr(store.kind, field)
        if ours != theirs:
            raise SettingError(
                f"model.{field} is {ours}, but the tokens at {store.root} have {field} {theirs}: train with"
                f" --model.{field.replace('_', '-')} {theirs}, or prepare others"
            )
    return store


def _claim(settings: config.Pretrain, store: TokenStore) -> None:
    """Write the run's config.json, or check that the run that is already there is this one.

    A run without a checkpoint has nothing to lose, so its settings may still be mended.
    """
    identity = {
        **settings.model_dump(mode="json", include={"model", "optim", "seed"}),
        "tokens": store.sha256,
        "split": settings.data.split,
    }
    uri = storage.join(settings.run.uri, "config.json")
    data = json.dumps({"identity": identity, **config.provenance(settings)}, indent=1).encode()
    if storage.write_new(uri, data):
        return
    there = json.loads(storage.read(uri))["identity"]
    for name, section in (("model", config.Model()), ("optim", config.Optim())):
        there[name] = section.model_dump(mode="json") | there[name]  # a setting newer than the run had its default
    differing = sorted(_differences(there, identity))
    if differing and not checkpoint.committed_steps(settings.run.uri):
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
    """The training loop, the same on every worker. Returns the last metrics and the release's URI."""
    cfg = config.Pretrain.model_validate(settings)
    run, batch_size = cfg.run, cfg.optim.batch_size
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = ray.train.torch.get_device()
    log_to_stderr()
    logging.getLogger("igpt_ray").propagate = False  # Ray Train's own handler would say every line again

    store = TokenStore.open(cfg.data.tokens)
    images = SplitCache(store, cfg.data.split)
    tokens_per_step = batch_size * cfg.model.n_positions
    masked = cfg.model.objective == "masked"
    counted_per_step = batch_size if masked else tokens_per_step  # what the loss is a mean over: images, or tokens

    torch.manual_seed(cfg.seed)
    mesh = init_device_mesh(device.type, (world_size,))
    model = parallel.shard(ImageGPT(cfg.model).to(device), mesh, cfg.workers.precision)
    optimizer = optim.build(model, cfg.optim, cfg.workers.precision)

    resumed = checkpoint.load_newest(run.uri, model, optimizer)
    step = resumed.step if resumed else 0
    lines = metrics.Metrics(run.uri, step)
    if rank == 0:
        log.info("%s from step %d on %d worker(s)", "resumed" if resumed else "started", step, world_size)

    nats_sum = torch.zeros((), dtype=torch.float64, device=device)
    data_seconds, since, since_step = 0.0, time.perf_counter(), step
    while step < cfg.optim.steps:
        fetching = time.perf_counter()
        mine = share(global_batch(cfg.seed, step, batch_size, len(images)), rank, world_size)
        tokens = torch.from_numpy(images[mine].astype(np.int64))  # (B, T)
        keep = _keep(cfg.seed, mine, cfg.model.n_positions) if masked else None
        data_seconds += time.perf_counter() - fetching

        # All workers take as many forward passes, or their collectives would not meet.
        n_micro = math.ceil(math.ceil(batch_size / world_size) / cfg.workers.micro_batch)
        kept = keep.tensor_split(n_micro) if keep is not None else [None] * n_micro
        for i, (micro, mask) in enumerate(zip(tokens.tensor_split(n_micro), kept, strict=True)):
            parallel.reduce_gradients(model, i == n_micro - 1)
            x = micro.to(device, non_blocking=True)
            nats = objectives.generative(model, x, None if mask is None else mask.to(device, non_blocking=True))
            (nats * (world_size / counted_per_step)).backward()  # FSDP averages over workers; the loss is a mean
            nats_sum += nats.detach()

        grad_norm = clip_grad_norm_(model.parameters(), cfg.optim.clip or math.inf)
        lr = optim.lr_at(step, cfg.optim)
        optim.set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        saving = step % run.checkpoint_every == 0 or step == cfg.optim.steps
        if saving or step % run.log_every == 0:
            assert isinstance(grad_norm, DTensor)
            dist.all_reduce(nats_sum)
            n_steps, now = step - since_step, time.perf_counter()
            line = {
                "step": step,
                "nats_per_token": float(nats_sum) / (n_steps * counted_per_step),
                "lr": lr,
                "grad_norm": float(grad_norm.full_tensor()),
                "tokens_per_second": round(n_steps * tokens_per_step / (now - since), 1),
                "data_wait": round(data_seconds / (now - since), 5),
            }
            if not math.isfinite(line["nats_per_token"]) or not math.isfinite(line["grad_norm"]):
                raise TrainingError(
                    f"loss or gradient is not finite between steps {since_step} and {step}: lower --optim.lr or set"
                    " --optim.clip; the run resumes from its last checkpoint"
                )
            lines.add(line)
            if rank == 0:
                eta = (cfg.optim.steps - step) * (now - since) / n_steps
                log.info(_LINE, step, cfg.optim.steps, line["nats_per_token"], line["tokens_per_second"], eta)
            nats_sum.zero_()
            data_seconds, since, since_step = 0.0, now, step

        if saving:
            if rank == 0:
                lines.flush()
            checkpoint.save(run.uri, step, model, optimizer, trainer={"world_size": world_size})
            if rank == 0:
                checkpoint.prune(run.uri, run.keep)
            since = time.perf_counter()

    release = storage.join(run.uri, "release")
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        about = weights.ReleaseConfig(
            format=weights.FORMAT,
            model=cfg.model,
            kind=store.kind,
            sha256="",
            classes=store.manifest.classes,
            trained={"steps": step, **lines.lines[-1], **config.provenance(cfg)},
        )
        weights.save_release(release, cast("dict[str, Tensor]", full), store.palette(), about)
    return {"run": run.uri, "release": release, "n_params": cfg.model.n_params, **lines.lines[-1]}


def _keep(seed: int, batch: Batch, n_positions: int) -> Tensor:
    """The masks of a worker's images, a function of (seed, epoch, row): the same on any number of workers."""
    rows = zip(batch.epochs.tolist(), batch.rows.tolist(), strict=True)
    return objectives.keep_masks([seed_of(seed, epoch, row) for epoch, row in rows], n_positions)


_LINE = "step %d of %d: %.4f nats per token, %.0f tokens/s, %.0f s left"
