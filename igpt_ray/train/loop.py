"""The training loop: the same on one CPU and on many GPUs, and with or without Ray around it.

`train` is called by every worker of a torch.distributed process group. All it knows of the past is in the run's folder
(`checkpoint.py`, `metrics.py`), all it trains on is a function of the step (`loader.py`), and what it shows on the way
is in `monitor.py`.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from igpt_ray import weights
from igpt_ray.data.loader import SplitCache, global_batch, keys_of
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import TrainingError
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.provenance import provenance
from igpt_ray.train import checkpoint, finetune, metrics, monitor, optim, parallelize, trackers
from igpt_ray.train.batches import MicroBatch, MicroBatchLoader, micro_batch_that_fits
from igpt_ray.train.config import FinetuneRunConfig, PretrainConfig
from igpt_ray.train.early_stopping import EarlyStopping

log = logging.getLogger(__name__)

NAMED = 8
"""Images that an error names."""


def train(
    cfg: PretrainConfig,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    show: Callable[[metrics.Line], None] = lambda line: None,
) -> dict[str, Any]:
    """Train to the last step and write the release. Returns the last metrics and the release's URI, on all workers.

    When any worker is told to leave, all of them save after the step they are at, and return `{"left": step}`.
    Worker 0 calls `show` with each line of metrics.
    Raises `TrainingError` at a loss or a gradient that is not finite, before it reaches weights or optimiser.
    """
    run, n_steps = cfg.run, cfg.optim.steps
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = TokenStore.open(cfg.data.tokens)
    labelled = cfg.model.n_class > 0
    images = SplitCache(store, cfg.data.split, labelled=labelled)
    micro_batch = cfg.workers.micro_batch or micro_batch_that_fits(cfg, device)
    feed = MicroBatchLoader(images, cfg.model, cfg.seed, micro_batch, device, finetune.augment_of(cfg))
    held_out = feed.beside(SplitCache(store, cfg.data.val_split, labelled=labelled)) if cfg.data.val_split else feed
    model, optimizer = build(cfg, device)

    saver = checkpoint.Saver(run.uri, run.keep, run.keep_every)
    resumed = checkpoint.load_newest(run.uri, model, optimizer)
    step = resumed.step if resumed else 0
    lines = metrics.Metrics(run.uri, step, run.tensorboard)
    patience = cfg.tune.patience if isinstance(cfg, FinetuneRunConfig) else None
    stopping = EarlyStopping(patience, lines.lines)
    if resumed is None:
        finetune.start(model, cfg)
    meter = monitor.Meter(cfg, device, len(images), step)
    profiler = monitor.Profiler(run, device)
    tracker = trackers.tracker_of(cfg) if rank == 0 else None
    if rank == 0:
        log.info("%s from step %d on %d worker(s)", "resumed" if resumed else "started", step, world_size)
        lines.flush()

    while step < n_steps and not stopping.should_stop:
        profiler.before(step)
        with meter.spent("data_wait"):
            micro_batches = feed.micro_batches(global_batch(cfg.seed, step, cfg.optim.batch_size, len(images)))
        sums = []
        for i, micro in enumerate(micro_batches):
            parallelize.reduce_gradients(model, i == len(micro_batches) - 1)
            summed = monitor.loss_sums(model, micro)
            loss = summed[0] * (world_size / meter.counted_per_step)  # FSDP averages over workers; the loss is a mean
            loss.backward()
            sums.append(summed.detach())

        grad_norm = clip_grad_norm_(model.parameters(), cfg.optim.clip or math.inf)
        *step_sums, step_norm, leaving = _measured(sums, grad_norm, should_stop())
        if not math.isfinite(step_sums[0] + step_norm):
            saver.wait()
            raise TrainingError(_which_images(cfg, store, step, micro_batches, sums, step_norm))
        lr = optim.lr_at(step, cfg.optim)
        optim.set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        meter.add(step_sums)

        saving, validating, sampling = (
            bool(every) and (step == n_steps or step % every == 0)
            for every in (run.checkpoint_every, run.validate_every, run.sample_every)
        )
        saving = saving or leaving > 0
        if saving or validating or step % run.log_every == 0:
            line = meter.line(step, lr, step_norm)
            if validating:
                with meter.spent("evaluation"):
                    line |= monitor.held_out(model, held_out, cfg.data.val_images)
            lines.add(line)
            if stopping.observe(line):
                with meter.spent("checkpoint_stall"):
                    _release(cfg, store, model, step, lines)
            if rank == 0:
                meter.say(line)
                show(line)
            if tracker is not None:
                tracker.log(line)
        if sampling:
            with meter.spent("evaluation"):
                monitor.draw_samples(model, held_out.images, store.palette(), device, run.uri, step)
        last = step == n_steps or stopping.should_stop
        if saving or last:
            with meter.spent("checkpoint_stall"):
                about = {"world_size": world_size}
                must = leaving > 0 or last or run.keeps(step)
                saver.save(step, model, optimizer, about, lines.flusher(), must=must)
        if leaving:
            break

    profiler.end()
    if tracker is not None:
        tracker.finish()
    if step < n_steps and not stopping.should_stop:
        saver.wait()
        return {"left": step}
    saver.finish()
    if stopping.best is None:  # in pretraining the last step is what counts
        _release(cfg, store, model, step, lines)
    report = {"run": run.uri, "release": run.release, "n_params": cfg.model.n_params, **lines.lines[-1]}
    return report | (finetune.released_best(run.release) if stopping.best else {})


def build(cfg: PretrainConfig, device: torch.device) -> tuple[ImageGPT, Optimizer]:
    """The sharded network with the weights of the seed, and its optimiser."""
    torch.manual_seed(cfg.seed)
    mesh = parallelize.mesh_of(device.type, cfg.workers.shard)
    model = parallelize.shard(ImageGPT(cfg.model).to(device), mesh, cfg.workers)
    return model, optim.build(model, cfg.optim, cfg.workers.precision)


# ------------------------------------------------------------------------------------------------ is it finite


def _measured(sums: list[Tensor], grad_norm: Tensor, leaving: bool) -> list[float]:
    """Sums of the step over all workers, then the gradient's norm and how many workers are leaving: the one wait for
    the device in a step.

    It ends with the backward pass; what must not be done with a bad gradient has not been asked for yet.
    """
    assert isinstance(grad_norm, DTensor)
    total = torch.stack(sums).double().sum(0)
    told = torch.cat([total, total.new_full((1,), leaving)])
    dist.all_reduce(told)
    measured: list[float] = torch.cat([told[:-1], grad_norm.full_tensor().double()[None], told[-1:]]).tolist()
    return measured


def _which_images(
    cfg: PretrainConfig, store: TokenStore, step: int, micro_batches: list[MicroBatch], sums: list[Tensor], norm: float
) -> str:
    """What a user needs to find the images, the same on all workers: those of the forward passes that went wrong, or
    of the whole batch if only its gradient did."""
    mine = [
        m.batch for m, summed in zip(micro_batches, sums, strict=True) if m.weight and not torch.isfinite(summed[0])
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    bad = [batch for batches in everyone for batch in batches]
    if bad:
        epochs, rows = (np.concatenate(parts) for parts in zip(*bad, strict=True))
    else:
        epochs, rows = global_batch(cfg.seed, step, cfg.optim.batch_size, store.manifest.rows(cfg.data.split))
    said = [""]
    if dist.get_rank() == 0:
        keys = keys_of(store, cfg.data.split, rows[:NAMED])
        named = ", ".join(f"{key} (row {row})" for key, row in zip(keys, rows, strict=False))
        said = [named + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")]
    dist.broadcast_object_list(said)
    first = step * cfg.optim.batch_size
    return (
        f"step {step + 1}, images {first} to {first + cfg.optim.batch_size - 1} since the start:"
        f" the {'loss' if bad else f'gradient (norm {norm})'} is not finite with {len(rows)} image(s) of"
        f" {cfg.data.split}, epoch {'-'.join(map(str, np.unique(epochs)))}: {said[0]}. Weights and optimiser were not"
        " touched; repeated, the run resumes from its last checkpoint. If it ends here again, start another run with"
        " a lower --optim.lr or with --optim.clip"
    )


# ------------------------------------------------------------------------------------------------ what comes out


def _release(cfg: PretrainConfig, store: TokenStore, model: ImageGPT, step: int, lines: metrics.Metrics) -> None:
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        about = weights.ReleaseConfig(
            format=weights.FORMAT,
            model=cfg.model,
            kind=store.kind,
            sha256="",
            classes=store.manifest.classes,
            trained={"steps": step, **lines.lines[-1], **provenance(cfg)},
        )
        weights.save_release(cfg.run.release, cast("dict[str, Tensor]", full), store.palette(), about)
