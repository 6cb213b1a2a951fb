"""Monitoring of a run: speed and lost time, loss on held-out images, sample completions, profiles."""

import gc
import logging
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile

from igpt_ray import rng, storage
from igpt_ray.data import pixels
from igpt_ray.data.loader import SplitCache
from igpt_ray.data.palette import Palette
from igpt_ray.errors import StorageError
from igpt_ray.generate import completion
from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT, outline
from igpt_ray.train import estimate
from igpt_ray.train.batches import MicroBatchLoader, evenly_spaced_batch
from igpt_ray.train.config import PretrainConfig, RunConfig

log = logging.getLogger(__name__)

TIMED = ("data_wait", "checkpoint_stall", "evaluation")
"""Activities of the host. Each is reported as a share of the time between two lines of metrics. `data_wait` is the
preparation of batches, during which a GPU computes."""
PROFILED = 3
"""Number of profiled steps."""
PICTURES, COMPLETIONS = 8, 3
"""Images in a figure of samples, and completions of each."""


class Meter:
    """Sums and times between two lines of metrics. A line is the same on every rank, except for times and memory."""

    def __init__(self, cfg: PretrainConfig, device: torch.device, n_images: int, step: int):
        self.cfg, self.device, self.n_images = cfg, device, n_images
        batch_size = cfg.optim.batch_size
        self.tokens_per_step = batch_size * cfg.model.n_positions
        self.loss_units_per_step = batch_size * losses.loss_units_per_image(cfg.model)
        """Divisor of the loss: images or tokens per step."""
        named = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak_flops = estimate.peak_flops(named)
        self._begin(step)

    def _begin(self, step: int) -> None:
        self.since_step, self.since = step, time.perf_counter()
        self.sums = dict.fromkeys(losses.sum_names(self.cfg.model), 0.0)
        self.seconds = dict.fromkeys(TIMED, 0.0)

    def add(self, sums: list[float]) -> None:
        """Add the sums of `MicroBatch.loss_sums` of one step, over all ranks."""
        for name, more in zip(self.sums, sums, strict=True):
            self.sums[name] += more

    @contextmanager
    def timed(self, on: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[on] += time.perf_counter() - started

    def line(self, step: int, lr: float, grad_norm: float) -> dict[str, Any]:
        """The line of metrics of `step`: means over the steps since the line before."""
        n_steps, elapsed = step - self.since_step, time.perf_counter() - self.since
        tokens_per_second = n_steps * self.tokens_per_step / elapsed
        line = {
            "step": step,
            "epoch": round(step * self.cfg.optim.batch_size / self.n_images, 4),
            **{name: total / (n_steps * self.loss_units_per_step) for name, total in self.sums.items()},
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": round(tokens_per_second, 1),
            **{name: round(seconds / elapsed, 5) for name, seconds in self.seconds.items()},
            "memory_gb": round(self._peak_bytes() / estimate.GB, 3),
            "time": round(time.time(), 1),
        }
        if self.peak_flops is not None:
            flops = tokens_per_second * estimate.flops_per_token(self.cfg.model, causal=True)
            line["mfu"] = round(flops / (dist.get_world_size() * self.peak_flops), 4)
        self._begin(step)
        return line

    def log_line(self, line: dict[str, Any]) -> None:
        left = (self.cfg.optim.steps - line["step"]) * self.tokens_per_step / line["tokens_per_second"]
        held_out = f" ({line['val_nats_per_token']:.4f} held out)" if "val_nats_per_token" in line else ""
        if "val_accuracy" in line:
            held_out += f", held-out accuracy {line['val_accuracy']:.1%}"
        log.info(
            "step %d of %d: %.4f nats per token%s, %.0f tokens/s, %.0f s left",
            *(line["step"], self.cfg.optim.steps, line["nats_per_token"], held_out, line["tokens_per_second"], left),
        )

    def _peak_bytes(self) -> int:
        """Peak memory of this rank's device; on a CPU, of its process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Profiler:
    """torch's profiler on rank 0 for a few steps.

    Writes a trace for chrome://tracing or Perfetto, and a table of the slowest operators, to `<run>/profile/`.
    """

    def __init__(self, run: RunConfig, device: torch.device):
        self.run = run
        self.first = run.profile_at - 1 if run.profile_at is not None and dist.get_rank() == 0 else None
        self.activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.profiler: profile | None = None

    def before(self, step: int) -> None:
        """Called before each step, and once after the last."""
        if step == self.first:
            self.profiler = profile(activities=self.activities, record_shapes=True, profile_memory=True)
            self.profiler.start()
        elif self.profiler is not None and self.first is not None and step == self.first + PROFILED:
            self.end()

    def end(self) -> None:
        if self.profiler is None:
            return
        self.profiler.stop()
        by = f"self_{'cuda' if len(self.activities) > 1 else 'cpu'}_time_total"
        table = self.profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=80)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            self.profiler.export_chrome_trace(str(trace))
            self.profiler = None
            try:
                storage.write(storage.join(self.run.uri, "profile", "table.txt"), table.encode())
                storage.upload(trace, storage.join(self.run.uri, "profile", "trace.json"))
            except StorageError as error:
                log.warning("the profile was not written: %s", error)


@torch.no_grad()
def held_out(model: ImageGPT, loader: MicroBatchLoader, n: int) -> dict[str, float]:
    """Means of the losses on at most n held-out images, over all ranks. Every rank must call it.

    A masked model sees one fixed mask per image.
    """
    batch = evenly_spaced_batch(loader.images, n)
    names = losses.sum_names(loader.model)
    sums = torch.zeros(len(names), dtype=torch.float64, device=loader.device)
    for micro in loader.micro_batches(batch):
        sums += micro.loss_sums(model)
    assert isinstance(model, FSDPModule)
    model.reshard()  # because no backward pass does it
    dist.all_reduce(sums)
    units = len(batch.rows) * losses.loss_units_per_image(loader.model)
    return {f"val_{name}": total / units for name, total in zip(names, sums.tolist(), strict=True)}


def draw_samples(
    model: ImageGPT, split: SplitCache, palette: Palette, device: torch.device, precision: str, run: str, step: int
) -> None:
    """Complete the upper halves of a few fixed images with fixed seeds, and write the figure to `<run>/samples/`.

    Every rank must call it. Rank 0 gathers the unsharded network, which takes 4 bytes per parameter in host memory, and
    samples in `precision` on the device while the other ranks wait.
    """
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return
    originals = split[evenly_spaced_batch(split, PICTURES)]  # (N, T)
    rows = model.config.n_px // 2
    prompts = torch.from_numpy(originals[:, : rows * model.config.n_px].astype(np.int64)).to(device)
    seeds = [rng.seed_of("sample", i) for i in range(len(originals) * COMPLETIONS)]
    with _memory_for_sampling(device):
        plain = outline(model.config)
        plain.load_state_dict(full, assign=True)
        plain.to(device, getattr(torch, precision)).eval()
        samples = completion.complete(plain, prompts, COMPLETIONS, seeds).cpu().numpy().astype(np.uint16)
        del plain
    figure = completion.figure(palette, originals, samples.reshape(len(originals), COMPLETIONS, -1), rows)
    try:
        storage.write(storage.join(run, "samples", f"step_{step:08d}.png"), pixels.png(figure))
    except StorageError as error:
        log.warning("the samples of step %d were not written: %s", step, error)


@contextmanager
def _memory_for_sampling(device: torch.device) -> Iterator[None]:
    """Return unused memory to a CUDA device: before sampling that of training, afterwards that of sampling.

    A CUDA graph and a step of training allocate blocks of other sizes. Cached blocks that neither can use would
    leave too little memory for a micro-batch that only just fits.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield
    if device.type == "cuda":
        gc.collect()  # an engine and its graph refer to each other
        torch.cuda.empty_cache()
