"""What a run shows on the way: how fast it is and why not faster, the loss on held-out images, finished pictures."""

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
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile

from igpt_ray import rng, storage
from igpt_ray.data import pixels
from igpt_ray.data.loader import Batch, SplitCache
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import evenly
from igpt_ray.errors import StorageError
from igpt_ray.generate import sampler
from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train import estimate
from igpt_ray.train.batches import MicroBatch, MicroBatchLoader
from igpt_ray.train.config import PretrainConfig, RunConfig

log = logging.getLogger(__name__)

SPENT = ("data_wait", "checkpoint_stall", "evaluation")
"""What a run does beside its steps. Each is given as a share of the time between two lines."""
PROFILED = 3
"""Steps that the profiler watches."""
PICTURES, COMPLETIONS = 8, 3
"""On a sheet of samples: pictures, and how often each is finished."""


def measured(model: ModelConfig) -> tuple[str, ...]:
    """What lines say of the steps; the first is the loss."""
    return ("loss", "nats_per_token", "accuracy") if model.n_class else ("nats_per_token",)


def loss_sums(model: ImageGPT, micro: MicroBatch) -> Tensor:
    """The sums of which what is `measured` are means: (1,), or (3,) with labels."""
    if micro.labels is None:
        return micro.weight * losses.generative(model, micro.tokens, micro.keep)[None]
    return micro.weight * losses.joint_parts(model, micro.tokens, micro.labels, micro.keep).sum(1)


def loss_units_per_image(model: ModelConfig) -> int:
    """An image counts by its tokens where the loss is a mean over them all, and as one where it is over images."""
    return 1 if model.objective == "masked" or model.n_class else model.n_positions


class Meter:
    """Sums between two lines of metrics; a line is the same on all workers but for what is timed."""

    def __init__(self, cfg: PretrainConfig, device: torch.device, n_images: int, step: int):
        self.cfg, self.device, self.n_images = cfg, device, n_images
        batch_size = cfg.optim.batch_size
        self.tokens_per_step = batch_size * cfg.model.n_positions
        self.counted_per_step = batch_size * loss_units_per_image(cfg.model)
        """What the loss is a mean over: images, or tokens."""
        named = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak_flops = estimate.peak_flops(named)
        self._begin(step)

    def _begin(self, step: int) -> None:
        self.since_step, self.since = step, time.perf_counter()
        self.sums = dict.fromkeys(measured(self.cfg.model), 0.0)
        self.seconds = dict.fromkeys(SPENT, 0.0)

    def add(self, sums: list[float]) -> None:
        """Those of `loss_sums`, over all workers."""
        for name, more in zip(self.sums, sums, strict=True):
            self.sums[name] += more

    @contextmanager
    def spent(self, on: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[on] += time.perf_counter() - started

    def line(self, step: int, lr: float, grad_norm: float) -> dict[str, Any]:
        """The line of `step`, over the steps since the one before."""
        n_steps, elapsed = step - self.since_step, time.perf_counter() - self.since
        tokens_per_second = n_steps * self.tokens_per_step / elapsed
        line = {
            "step": step,
            "epoch": round(step * self.cfg.optim.batch_size / self.n_images, 4),
            **{name: total / (n_steps * self.counted_per_step) for name, total in self.sums.items()},
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

    def say(self, line: dict[str, Any]) -> None:
        left = (self.cfg.optim.steps - line["step"]) * self.tokens_per_step / line["tokens_per_second"]
        held_out = f" ({line['val_nats_per_token']:.4f} held out)" if "val_nats_per_token" in line else ""
        if "val_accuracy" in line:
            held_out += f", {line['val_accuracy']:.1%} of held-out images right"
        log.info(
            "step %d of %d: %.4f nats per token%s, %.0f tokens/s, %.0f s left",
            *(line["step"], self.cfg.optim.steps, line["nats_per_token"], held_out, line["tokens_per_second"], left),
        )

    def _peak_bytes(self) -> int:
        """Of this worker's device so far; without one, of its process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Profiler:
    """torch's profiler on worker 0 for a few steps. `<run>/profile/` gets a trace for chrome://tracing or Perfetto, and
    a table of what took most time."""

    def __init__(self, run: RunConfig, device: torch.device):
        self.run = run
        self.wanted = run.profile_at > 0 and dist.get_rank() == 0
        self.kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.watching: profile | None = None

    def before(self, step: int) -> None:
        """Called before each step, and once after the last."""
        if self.wanted and step == self.run.profile_at - 1:
            self.watching = profile(activities=self.kinds, record_shapes=True, profile_memory=True)
            self.watching.start()
        elif self.watching is not None and step == self.run.profile_at - 1 + PROFILED:
            self.end()

    def end(self) -> None:
        if self.watching is None:
            return
        self.watching.stop()
        by = f"self_{'cuda' if len(self.kinds) > 1 else 'cpu'}_time_total"
        table = self.watching.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=80)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            self.watching.export_chrome_trace(str(trace))
            self.watching = None
            try:
                storage.write(storage.join(self.run.uri, "profile", "table.txt"), table.encode())
                storage.upload(trace, storage.join(self.run.uri, "profile", "trace.json"))
            except StorageError as error:
                log.warning("no profile: %s", error)


def spread_over(split: SplitCache, n: int) -> Batch:
    """At most n images, evenly over a split in its own order: the same at every step."""
    rows = evenly(len(split), n)
    return Batch(np.zeros_like(rows), rows)


@torch.no_grad()
def held_out(model: ImageGPT, feed: MicroBatchLoader, n: int) -> dict[str, float]:
    """What is measured of a step, on images that the model does not train on; sums and counts over all workers.

    Of a masked network under one mask an image, always the same.
    """
    batch = spread_over(feed.images, n)
    names = measured(feed.model)
    sums = torch.zeros(len(names), dtype=torch.float64, device=feed.device)
    for micro in feed.micro_batches(batch):
        sums += loss_sums(model, micro)
    assert isinstance(model, FSDPModule)
    model.reshard()  # no backward pass comes to do it
    dist.all_reduce(sums)
    counted = len(batch.rows) * loss_units_per_image(feed.model)
    return {f"val_{name}": total / counted for name, total in zip(names, sums.tolist(), strict=True)}


def draw_samples(
    model: ImageGPT, split: SplitCache, palette: Palette, device: torch.device, run: str, step: int
) -> None:
    """Finish the upper halves of a few pictures, always the same with the same random numbers: `samples/` of the run.

    Worker 0 gathers the network, plain and in float32 (4 bytes a parameter, in its host's memory and on its device,
    for as long as it samples), while the others wait.
    """
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return
    with torch.device("meta"):
        plain = ImageGPT(model.config)
    plain.load_state_dict(full, assign=True)
    plain.to(device).eval()

    originals = split[spread_over(split, PICTURES)]  # (N, T)
    n_px = model.config.n_px
    rows = n_px // 2
    given = torch.from_numpy(originals[:, : rows * n_px].astype(np.int64)).to(device)
    seeds = [rng.seed_of("sample", i) for i in range(len(originals) * COMPLETIONS)]
    done = sampler.complete(plain, given, COMPLETIONS, seeds).cpu().numpy().astype(np.uint16)
    figure = sampler.figure(palette, originals, done.reshape(len(originals), COMPLETIONS, -1), rows)
    try:
        storage.write(storage.join(run, "samples", f"step_{step:08d}.png"), pixels.png(figure))
    except StorageError as error:
        log.warning("no samples of step %d: %s", step, error)
