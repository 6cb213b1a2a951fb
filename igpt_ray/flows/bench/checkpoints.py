"""What checkpoints cost a run: the same steps with none, with one stored beside them, and with one waited for.

The ways take turns in one process, in another order each round, so that what else the machine does hits them alike.
"""

import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from igpt_ray import checkpoint, config, objectives, storage, training

WAYS = ("none", "beside", "waited")


def checkpoints(settings: config.BenchCheckpoints) -> dict[str, Any]:
    """Medians over rounds of the seconds of `steps` steps, of which the first begins with a save."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(settings.threads)
    model_shape = config.Model(n_layer=8, n_embd=settings.n_embd, n_head=8, n_px=16, n_vocab=512)
    cfg = config.Pretrain(model=model_shape)
    model, optimizer = training.build(cfg, torch.device("cpu"))
    tokens = torch.randint(0, model_shape.n_vocab, (settings.images, model_shape.n_positions))

    def step() -> None:
        (objectives.generative(model, tokens) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    stalls, stored = [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Saver(storage.join(settings.place or folder, "run"), keep=1)
        step()
        saver.save(1, model, optimizer, {})  # the first makes room for the copies that all reuse
        saver.finish()
        for r in range(settings.rounds):
            for way in WAYS[r % 3 :] + WAYS[: r % 3]:
                started = time.perf_counter()
                if way != "none":
                    saver.save(r + 2, model, optimizer, {}, must=True)
                    stalls.append(time.perf_counter() - started)
                if way == "waited":
                    saver.finish()
                    stored.append(time.perf_counter() - started)
                for _ in range(settings.steps):
                    step()
                seconds[way].append(time.perf_counter() - started)
                saver.finish()
    dist.destroy_process_group()
    added = {way: [a / b - 1 for a, b in zip(seconds[way], seconds["none"], strict=True)] for way in WAYS[1:]}
    return {
        "n_params": model_shape.n_params,
        "checkpoint_mb": round(12 * model_shape.n_params / 1e6),
        "step_seconds": round(statistics.median(seconds["none"]) / settings.steps, 4),
        "stall_seconds": round(statistics.median(stalls), 4),
        "stored_seconds": round(statistics.median(stored), 4),
        "added": {way: round(statistics.median(each), 4) for way, each in added.items()},
        "rounds": settings.rounds,
    }
