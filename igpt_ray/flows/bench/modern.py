"""The modern recipe and each of its switches beside the paper's, on the same tokens in the same order.

Network, optimiser, schedule, order and loss are the functions of training; only the loop is plain. No Ray. Every run
is judged on the same held-out images. FLOPs are those of `estimate.py`, attention in full, Muon's own included.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_ray import config, estimate, evaluate, objectives, optim, storage
from igpt_ray.config import BenchModern, Model, Optim
from igpt_ray.flows.job import log_to_stderr
from igpt_ray.loader import SplitCache, global_batch
from igpt_ray.model import ImageGPT
from igpt_ray.shards import TokenStore, Tokens

log = logging.getLogger(__name__)
Report = dict[str, Any]
Curve = list[tuple[int, float]]
"""Steps done, and nats per held-out token after them."""

SWITCHES: dict[str, Report] = {
    "Muon": {"optim": {"muon_lr": 0.02}},
    "QK-norm": {"model": {"qk_norm": True}},
    "ReLU squared": {"model": {"activation": "relu2"}},
    "grid rotary": {"model": {"rotary": "grid"}},
    "zero init": {"model": {"zero_init": True}},
    "cool-down": {"optim": {"cooldown": 0.6}},
}


def modern(settings: BenchModern) -> Report:
    """Tune the learning rates of both recipes on the first seed, then run every row on every seed."""
    log_to_stderr()
    bench = Bench(settings)
    lr = bench.tuned("paper, lr", lambda lr: {"optim": {"lr": lr}}, 3e-3)
    full = together(*SWITCHES.values(), {"optim": {"lr": lr}})
    muon_lr = bench.tuned("modern, muon_lr", lambda x: together(full, {"optim": {"muon_lr": x}}), 0.02)
    full = together(full, {"optim": {"muon_lr": muon_lr}})
    adam_lr = bench.tuned("modern, lr", lambda x: together(full, {"optim": {"lr": x}}), lr)
    without_muon = bench.tuned(
        "modern without Muon, lr", lambda x: together(full, {"optim": {"muon_lr": None, "lr": x}}), lr
    )
    full = together(full, {"optim": {"lr": adam_lr}})
    paper: Report = {"optim": {"lr": lr}}
    switches = SWITCHES | {"Muon": {"optim": {"muon_lr": muon_lr, "lr": adam_lr}}}

    rows = {
        "paper": paper,
        "modern": full,
        "modern, half the steps": together(full, {"optim": {"steps": settings.steps // 2}}),
    }
    rows |= {f"paper + {name}": together(paper, switch) for name, switch in switches.items()}
    for name in switches:
        rows[f"modern - {name}"] = together(*(s for other, s in switches.items() if other != name))
        rate = without_muon if name == "Muon" else adam_lr
        rows[f"modern - {name}"] = together(rows[f"modern - {name}"], {"optim": {"lr": rate}})
    s = settings
    halved = {"optim": {"batch_size": s.batch_size // 2, "steps": 2 * s.steps, "warmup_steps": 2 * s.warmup_steps}}
    rows |= {
        "modern, a third of the steps": together(full, {"optim": {"steps": s.steps // 3}}),
        "modern, q k v as one matrix": together(full, {"optim": {"split_qkv": False}}),
        "modern, rotary in a line": together(full, {"model": {"rotary": "line"}}),
        "modern, half as deep": together(full, {"model": {"n_layer": s.n_layer // 2, "n_embd": s.n_embd * 11 // 8}}),
        "modern, twice as deep": together(full, {"model": {"n_layer": s.n_layer * 2, "n_embd": s.n_embd * 3 // 4}}),
        "paper, half the batch": together(paper, halved),
        "modern, half the batch": together(full, halved),
    }
    for seed in range(settings.seeds):
        for name, changes in rows.items():
            bench.run(name, changes, seed)
    return {}


def together(*changes: Report) -> Report:
    return {section: {k: v for c in changes for k, v in c.get(section, {}).items()} for section in ("model", "optim")}


class Bench:
    """Everything that runs have in common; what has been run is kept in `out` and not run again."""

    def __init__(self, settings: BenchModern):
        torch.set_num_threads(1)
        self.settings = settings
        store = TokenStore.open(settings.tokens)
        self.images = SplitCache(store, settings.split)
        self.held_out: Tokens = SplitCache(store, settings.held_out).views[0]
        self.model = Model(
            n_layer=settings.n_layer,
            n_embd=settings.n_embd,
            n_head=settings.n_head,
            n_px=store.kind.n_px,
            n_vocab=store.kind.n_vocab,
        )
        self.out = Path(settings.out)
        self.found: dict[str, Report] = json.loads(self.out.read_text()) if self.out.exists() else {}

    def run(self, name: str, changes: Report, seed: int = 0) -> Report:
        key = json.dumps({"seed": seed, **changes}, sort_keys=True)
        if key not in self.found:
            self.found[key] = self.trained(changes, seed)
            self.out.write_text(json.dumps(self.found, indent=0))
            log.info("%s: %.4f nats per token, %.0f s", name, self.found[key]["nats"], self.found[key]["seconds"])
        return self.found[key]

    def tuned(self, name: str, changes: Callable[[float], Report], start: float) -> float:
        """The best of start, its doubles and its halves, as far as each step improves the held-out loss."""

        def nats(rate: float) -> float:
            return self.run(f"{name} {rate:g}", changes(rate))["nats"]

        best = start
        for factor in (2.0, 0.5):
            while nats(best * factor) < nats(best):
                best *= factor
        return best

    def trained(self, changes: Report, seed: int) -> Report:
        s = self.settings
        model = Model.model_validate(self.model.model_dump() | changes.get("model", {}))
        recipe = {"batch_size": s.batch_size, "steps": s.steps, "warmup_steps": s.warmup_steps}
        opt = Optim.model_validate(recipe | changes.get("optim", {}))
        started = time.perf_counter()
        torch.manual_seed(seed)
        network = ImageGPT(model)
        optimizer = optim.build(network, opt)
        curve: Curve = []
        for step in range(opt.steps):
            batch = self.images[global_batch(seed, step, opt.batch_size, len(self.images))]
            tokens = torch.from_numpy(batch.astype(np.int64))
            (objectives.generative(network, tokens) / tokens.numel()).backward()
            optim.set_lr(optimizer, optim.lr_at(step, opt))
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) * opt.batch_size % (s.evaluate_every * s.batch_size) == 0 or step + 1 == opt.steps:
                nats = evaluate.image_nats(network, self.held_out, 64).mean() / model.n_positions
                curve.append((step + 1, float(nats)))
        return {"nats": curve[-1][1], "curve": curve, "seconds": time.perf_counter() - started, "changes": changes}
