"""Parts `train` and `checkpoint` of `benchmarks/gpu.py`: the training loop and its checkpoints, without Ray."""

import hashlib
import json
import logging
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gpu import Part
from benchmarks.gpu_device import SIZES, device_of
from igpt_ray import storage
from igpt_ray.data import token_store
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_format import TokenFormat
from igpt_ray.data.token_store import Manifest, Shard, Statistics
from igpt_ray.model.config import ModelConfig
from igpt_ray.train import checkpoint, estimate, loop, metrics
from igpt_ray.train.alone import train_alone
from igpt_ray.train.config import PretrainConfig
from igpt_ray.train.presets import PRESETS

STEPS_PER_LINE = 2
WARM_UP_LINES = 2
"""Lines of metrics that are not counted: compilation, first allocations, and the choice of kernels."""
VARIANTS: dict[str, dict[str, Any]] = {
    "compiled": {"precision": "bfloat16", "compile": True, "micro_batch": "auto"},
    "eager": {"precision": "bfloat16", "compile": False, "micro_batch": "auto"},
    "compiled 32": {"precision": "bfloat16", "compile": True, "micro_batch": 32},
    "float32": {"precision": "float32", "compile": False, "micro_batch": 16},
}
MEASURED = (
    ("igpt-s", "compiled"),
    ("igpt-m", "compiled"),
    ("igpt-l", "compiled"),
    ("igpt-s", "eager"),
    ("profile", "compiled"),
    ("igpt-m", "eager"),
    ("igpt-s-modern", "compiled"),
    ("igpt-l", "eager"),
    ("igpt-s", "compiled 32"),
    ("igpt-s", "float32"),
    ("profile", "eager"),
)
"""In order of importance: a short budget ends the list early."""


class _Measured(Exception):
    """Ends a run without its last checkpoint and release."""


def train_part(part: Part) -> None:
    """Tokens/s, MFU and memory of S, M and L, eager and compiled, by the lines of metrics of the loop itself."""
    device = device_of(part)
    logging.basicConfig(level=logging.INFO)
    ceilings = part.out / "where.json"
    if ceilings.exists():
        part.report["ceiling_tflops"] = json.loads(ceilings.read_text())["product_tflops"]["square"]
    with tempfile.TemporaryDirectory() as folder:
        stores: dict[ModelConfig, str] = {}
        for size, variant in MEASURED:
            cfg = settings_of("igpt-s" if size == "profile" else size, VARIANTS[variant], Path(folder), part)
            root = stores.setdefault(cfg.model, "")
            if not root:
                root = stores[cfg.model] = random_store(cfg.model, 512, f"{folder}/tokens-{len(stores)}")
            cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"tokens": root})})
            work = profile if size == "profile" else speed
            part.measure(f"{size} {variant}", lambda cfg=cfg, work=work: work(cfg, device, part))


def settings_of(size: str, workers: dict[str, Any], folder: Path, part: Part) -> PretrainConfig:
    cfg = PRESETS[size][1].model_dump()
    if part.toy:
        cfg["model"] |= {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_px": 4, "n_vocab": 16}
        cfg["optim"]["batch_size"] = 4
    cfg["optim"]["steps"] = 1_000_000
    cfg["workers"] |= workers | {"gpus": 0 if part.toy else 1}
    name = f"{size}-{'-'.join(str(v) for v in workers.values())}"
    cfg["run"] |= {"root": str(folder / "runs"), "name": name, "log_every": STEPS_PER_LINE, "checkpoint_every": 10**6}
    return PretrainConfig.model_validate(cfg)


def random_store(model: ModelConfig, n: int, root: str) -> str:
    """A token store of n images of random tokens, split `train`."""
    colours = np.random.default_rng(0).uniform(-1, 1, (model.n_vocab, 3)).astype(np.float32)
    palette = Palette(colours)
    kind = TokenFormat(n_px=model.n_px, n_vocab=model.n_vocab, palette=palette.fingerprint, pipeline="reference-1")
    tokens = np.random.default_rng(1).integers(0, model.n_vocab, (n, model.n_positions)).astype(np.uint16)
    keys, labels = [str(i) for i in range(n)], [i % 10 for i in range(n)]
    data = token_store.encode(keys, labels, tokens, kind, {"unit": "0", "split": "train", "view": "0"})
    shard = Shard(
        path="train/00000-v0.parquet",
        split="train",
        view=0,
        rows=n,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        source="0" * 64,
        statistics=Statistics(quarantined=0, source_bytes=0, squared_error=0),
    )
    storage.write(storage.join(root, shard.path), data)
    storage.write(storage.join(root, "palette.npy"), palette.npy())
    manifest = Manifest(
        format=token_store.FORMAT, kind=kind, classes=[str(i) for i in range(10)], shards=[shard], made_by={}
    )
    return token_store.commit(root, manifest).root


def speed(cfg: PretrainConfig, device: torch.device, part: Part) -> dict[str, Any]:
    """Medians over lines of metrics after the warm-up."""
    n_lines = WARM_UP_LINES + (2 if part.toy else 5)
    lines: list[metrics.Line] = []
    started, first = time.monotonic(), []

    def on_metrics(line: metrics.Line) -> None:
        lines.append(line)
        first.append(time.monotonic() - started)
        if len(lines) == n_lines or (part.seconds_left < 0 and len(lines) > WARM_UP_LINES):
            raise _Measured

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    run_alone(cfg, device, on_metrics)
    counted = lines[WARM_UP_LINES:]
    rate = statistics.median(line["tokens_per_second"] for line in counted)
    tflops = rate * estimate.flops_per_token(cfg.model, causal=True) / 1e12
    report = {
        "tokens_per_second": round(rate),
        "ms_per_step": round(1e3 * cfg.optim.batch_size * cfg.model.n_positions / rate, 2),
        "tflops": round(tflops, 1),
        "mfu_of_sheet": counted[-1].get("mfu"),
        "peak_gb": counted[-1]["memory_gb"],
        "estimated_gb": round(estimated_bytes(cfg, device) / estimate.GB, 3),
        "seconds_to_first_line": round(first[0], 1),
        "data_wait": max(line["data_wait"] for line in counted),
        "spread": [round(line["tokens_per_second"]) for line in counted],
    }
    if "ceiling_tflops" in part.report:
        report["mfu_of_measured"] = round(tflops / part.report["ceiling_tflops"], 4)
    return report


def estimated_bytes(cfg: PretrainConfig, device: torch.device) -> float:
    """Memory of the run by the arithmetic of `igpt estimate`."""
    cfg = cfg.resolved(on_gpu=device.type == "cuda")
    images = cfg.workers.micro_batch
    if images == "auto":
        memory = torch.cuda.get_device_properties(device).total_memory
        images = estimate.images_that_fit(cfg, cfg.optim.batch_size, memory)
    passes = -(-cfg.optim.batch_size // images)
    return sum(estimate.memory_bytes(cfg, -(-cfg.optim.batch_size // passes), passes).values())


def run_alone(cfg: PretrainConfig, device: torch.device, on_metrics: Any) -> None:
    """The training loop without Ray, until `on_metrics` ends it."""
    with suppress(_Measured):
        train_alone(cfg, device, on_metrics)


def profile(cfg: PretrainConfig, device: torch.device, part: Part) -> str:
    """Write the slowest kernels of three steps to `<out>/profile-....txt`, and return its name."""
    root = storage.join(cfg.run.root, "profiled")
    cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"profile_at": 5, "root": root})})

    def on_metrics(line: metrics.Line) -> None:
        if line["step"] >= 10:
            raise _Measured

    torch.compiler.reset()
    run_alone(cfg, device, on_metrics)
    name = f"profile-{cfg.run.name}.txt"
    (part.out / name).write_bytes(storage.read(storage.join(cfg.run.uri, "profile", "table.txt")))
    return name


# ------------------------------------------------------------------------------------------------ checkpoints


def checkpoints_of(size: str, device: torch.device, part: Part) -> dict[str, Any]:
    """Milliseconds that `Saver.save` stalls training, and seconds until the checkpoint is stored, for three saves."""
    stalls, stored = [], []
    with tempfile.TemporaryDirectory() as folder:
        cfg = settings_of(size, VARIANTS["eager"], Path(folder), part)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            model, optimizer = loop.build(cfg, device)
            tokens = torch.randint(0, cfg.model.n_vocab, (2, cfg.model.n_positions), device=device)
            saver = checkpoint.Saver(f"{folder}/run", keep=1)
            for step in range(1, 4):
                model(tokens).float().logsumexp(-1).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                started = time.perf_counter()
                saver.save(step, model, optimizer, {})
                stalls.append(round(1e3 * (time.perf_counter() - started), 1))
                saver.finish()
                stored.append(round(time.perf_counter() - started, 2))
        finally:
            dist.destroy_process_group()
    size_gb = 12 * cfg.model.n_params / estimate.GB
    return {"stall_ms": stalls, "stored_s": stored, "gb": round(size_gb, 2)}


def checkpoint_part(part: Part) -> None:
    device = device_of(part)
    for size in SIZES[:2]:
        part.measure(size, lambda size=size: checkpoints_of(size, device, part))
