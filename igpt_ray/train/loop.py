"""The training loop: the same on one CPU and on many GPUs, and with or without Ray around it.

Every rank of a torch.distributed process group calls `train`. The only state of a run is its folder (`checkpoint.py`,
`metrics.py`), and a batch is a function of the seed and the step (`data/loader.py`). `monitor.py` measures the run.
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
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from igpt_ray import weights
from igpt_ray.data.loader import SplitCache, global_batch, keys_of
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import TrainingError
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.provenance import provenance
from igpt_ray.train import checkpoint, finetune, metrics, monitor, optim, parallelize, trackers
from igpt_ray.train.batches import MicroBatch, MicroBatchLoader, equal_micro_batch
from igpt_ray.train.config import FinetuneRunConfig, PretrainConfig
from igpt_ray.train.early_stopping import EarlyStopping
from igpt_ray.train.memory import micro_batch_that_fits

log = logging.getLogger(__name__)

MAX_IMAGES_IN_ERROR = 8
"""Most images that an error names."""


def train(
    cfg: PretrainConfig,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    on_metrics: Callable[[metrics.Line], None] = lambda line: None,
) -> dict[str, Any]:
    """Train to the last step and write the release. Returns the last metrics and the release's URI, on every rank.

    When `should_stop` is True on any rank, all ranks save after the current step and return `{"stopped_at": step}`.
    Rank 0 calls `on_metrics` with each line of metrics. Raises `TrainingError` if the loss or the gradient is not
    finite, before weights or optimiser change.
    """
    cfg = cfg.resolved(on_gpu=device.type == "cuda")
    run, n_steps = cfg.run, cfg.optim.steps
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = TokenStore.open(cfg.data.tokens)
    labelled = cfg.model.n_class > 0
    images = SplitCache(store, cfg.data.split, labelled=labelled)
    micro_batch = cfg.workers.micro_batch
    if micro_batch == "auto":
        micro_batch = micro_batch_that_fits(cfg, device)
    equal = cfg.workers.compile is True
    if equal:
        micro_batch = equal_micro_batch(cfg.optim.batch_size, world_size, micro_batch)
    loader = MicroBatchLoader(images, cfg.model, cfg.seed, micro_batch, device, finetune.augment_of(cfg), equal)
    held_out = (
        loader.with_images(SplitCache(store, cfg.data.val_split, labelled=labelled)) if cfg.data.val_split else loader
    )
    model, optimizer = build(cfg, device)

    saver = checkpoint.Saver(run.uri, run.keep, run.keep_every)
    resumed = checkpoint.load_newest(run.uri, model, optimizer)
    step = resumed.step if resumed else 0
    lines = metrics.Metrics(run.uri, step, run.tensorboard and rank == 0)
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

    def micro_batches_of(step: int) -> list[MicroBatch]:
        if step == n_steps:
            return []
        with meter.timed("data_wait"):
            return loader.micro_batches(global_batch(cfg.seed, step, cfg.optim.batch_size, len(images)))

    micro_batches = micro_batches_of(step)
    while step < n_steps and not stopping.should_stop:
        profiler.before(step)
        sums = []
        for i, micro in enumerate(micro_batches):
            parallelize.reduce_gradients(model, i == len(micro_batches) - 1)
            summed = micro.loss_sums(model)
            loss = summed[0] * (world_size / meter.loss_units_per_step)  # FSDP averages over ranks
            loss.backward()
            sums.append(summed.detach())

        grad_norm = _clipped_grad_norm(model, cfg.optim.clip)
        reduced = _reduce_step(sums, grad_norm, should_stop())
        lr = optim.lr_at(step, cfg.optim)
        optim.step_if_finite(optimizer, lr, reduced[0] + reduced[-2])
        next_micro_batches = micro_batches_of(step + 1)  # while a GPU computes
        *step_sums, step_norm, stop_requests = reduced.tolist()  # the step's only device synchronisation
        if not math.isfinite(step_sums[0] + step_norm):
            saver.wait()
            raise TrainingError(_non_finite_message(cfg, store, step, micro_batches, sums, step_norm))
        step, micro_batches = step + 1, next_micro_batches
        meter.add(step_sums)

        saving, validating, sampling = (
            every is not None and (step == n_steps or step % every == 0)
            for every in (run.checkpoint_every, run.validate_every, run.sample_every)
        )
        saving = saving or stop_requests > 0
        if saving or validating or step % run.log_every == 0:
            line = meter.line(step, lr, step_norm)
            if validating:
                with meter.timed("evaluation"):
                    line |= monitor.held_out(model, held_out, cfg.data.val_images)
            lines.add(line)
            if stopping.observe(line):
                with meter.timed("checkpoint_stall"):
                    _release(cfg, store, model, step, lines)
            if rank == 0:
                meter.log_line(line)
                on_metrics(line)
            if tracker is not None:
                tracker.log(line)
        if sampling:
            with meter.timed("evaluation"):
                monitor.draw_samples(
                    model, held_out.images, store.palette(), device, cfg.workers.precision, run.uri, step
                )
        last = step == n_steps or stopping.should_stop
        if saving or last:
            with meter.timed("checkpoint_stall"):
                metadata = {"world_size": world_size}
                must = stop_requests > 0 or last or run.keeps(step)
                saver.save(step, model, optimizer, metadata, lines.flusher(), must=must)
        if stop_requests:
            break

    profiler.end()
    if tracker is not None:
        tracker.finish()
    if step < n_steps and not stopping.should_stop:
        saver.wait()
        return {"stopped_at": step}
    saver.finish()
    if stopping.best is None:  # without early stopping, the last step is released
        _release(cfg, store, model, step, lines)
    report = {"run": run.uri, "release": run.release, "n_params": cfg.model.n_params, **lines.lines[-1]}
    return report | (finetune.released_best(run.release) if stopping.best else {})


def build(cfg: PretrainConfig, device: torch.device) -> tuple[ImageGPT, Optimizer]:
    """The sharded network, initialised from the seed, and its optimiser. Every rank must call it."""
    cfg = cfg.resolved(on_gpu=device.type == "cuda")
    torch.set_float32_matmul_precision(cfg.workers.float32_matmul)
    torch.manual_seed(cfg.seed)
    mesh = parallelize.mesh_of(device.type, cfg.workers.shard)
    model = parallelize.shard(ImageGPT(cfg.model).to(device), mesh, cfg.workers)
    return model, optim.build(model, cfg.optim, cfg.workers.precision)


# ------------------------------------------------------------------------------------------------ finite losses


def _clipped_grad_norm(model: ImageGPT, clip: float | None) -> Tensor:
    """Norm of all gradients, which are then multiplied to a norm of at most `clip`; None leaves them as they are."""
    if clip is not None:
        return clip_grad_norm_(model.parameters(), clip)
    return get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def _reduce_step(sums: list[Tensor], grad_norm: Tensor, stop_requests: bool) -> Tensor:
    """All-reduce of losses, gradient norm and number of stop requests, in this order: (losses + 2,) float64."""
    assert isinstance(grad_norm, DTensor)
    total = torch.stack(sums).double().sum(0)
    local = torch.cat([total, total.new_full((1,), stop_requests)])
    dist.all_reduce(local)
    return torch.cat([local[:-1], grad_norm.full_tensor().double()[None], local[-1:]])


def _non_finite_message(
    cfg: PretrainConfig, store: TokenStore, step: int, micro_batches: list[MicroBatch], sums: list[Tensor], norm: float
) -> str:
    """Error message, the same on every rank, that names the images of the micro-batches whose loss is not finite, or
    of the whole batch if only its gradient is not finite."""
    mine = [
        m.batch
        for m, summed in zip(micro_batches, sums, strict=True)
        if len(m.batch.rows) and not torch.isfinite(summed[0])
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    bad = [batch for batches in everyone for batch in batches]
    if bad:
        epochs, rows = (np.concatenate(parts) for parts in zip(*bad, strict=True))
    else:
        epochs, rows = global_batch(cfg.seed, step, cfg.optim.batch_size, store.manifest.rows(cfg.data.split))
    text = [""]
    if dist.get_rank() == 0:
        keys = keys_of(store, cfg.data.split, rows[:MAX_IMAGES_IN_ERROR])
        named = ", ".join(f"{key} (row {row})" for key, row in zip(keys, rows, strict=False))
        text = [named + (f" and {len(rows) - MAX_IMAGES_IN_ERROR} more" if len(rows) > MAX_IMAGES_IN_ERROR else "")]
    dist.broadcast_object_list(text)
    first = step * cfg.optim.batch_size
    return (
        f"step {step + 1}, images {first} to {first + cfg.optim.batch_size - 1} since the start:"
        f" the {'loss' if bad else f'gradient (norm {norm})'} is not finite with {len(rows)} image(s) of"
        f" {cfg.data.split}, epoch {'-'.join(map(str, np.unique(epochs)))}: {text[0]}. Weights and optimiser are"
        " unchanged; the same command resumes the run from its last checkpoint. If the error repeats, start another"
        " run with a lower --optim.lr or with --optim.clip"
    )


# ------------------------------------------------------------------------------------------------ release


def _release(cfg: PretrainConfig, store: TokenStore, model: ImageGPT, step: int, lines: metrics.Metrics) -> None:
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        metadata = weights.ReleaseConfig(
            format=weights.FORMAT,
            model=cfg.model,
            kind=store.kind,
            sha256="",
            classes=store.manifest.classes,
            trained={"steps": step, **lines.lines[-1], **provenance(cfg)},
        )
        weights.save_release(cfg.run.release, cast("dict[str, Tensor]", full), store.palette(), metadata)
