"""The paper's recipe, the modern recipe, and each switch between them, on the same tokens in the same order.

Network, optimiser, schedule, order and loss are the functions of training; only the loop is simpler. Every run is
evaluated on the same held-out images. FLOPs are those of `igpt_ray.train.estimate`, with full attention and including
Muon's own.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_ray.data.loader import SplitCache, global_batch
from igpt_ray.data.token_store import TokenStore
from igpt_ray.evaluate import likelihood
from igpt_ray.flows.job import log_to_stderr
from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.settings import Count, Section, Uri
from igpt_ray.train import estimate, optim
from igpt_ray.train.config import OptimConfig

log = logging.getLogger(__name__)
Report = dict[str, Any]
Curve = list[tuple[int, float]]
"""Pairs of steps done and nats per held-out token."""

SWITCHES: dict[str, Report] = {
    "Muon": {"optim": {"muon_lr": 0.02}},
    "QK-norm": {"model": {"qk_norm": True}},
    "rotary": {"model": {"rotary": True}},
    "cool-down": {"optim": {"schedule": "warmup_stable_decay"}},
}


class BenchModernConfig(Section):
    """Train with the paper's recipe, the modern one, and each switch between them, on the same tokens."""

    tokens: Uri
    """URI of a token store; `make demo` writes one of digits to demo-out/data/tokens."""
    out: Uri
    """JSON file of all runs' curves. Runs that the file already has are not repeated."""
    split: str = "train"
    """Split to train on."""
    held_out: str = "test"
    """Split to evaluate on."""
    n_layer: Count = 4
    """Blocks of the network."""
    n_embd: Count = 64
    """Width of the network."""
    n_head: Count = 2
    """Attention heads of the network."""
    batch_size: Count = 32
    """Images per step."""
    steps: Count = 300
    """Steps of every run."""
    warmup_steps: Count = 30
    """Steps of linear warm-up."""
    evaluate_every: Count = 20
    """Steps between evaluations."""
    seeds: Count = 2
    """Repetitions of each run, with other initial weights and another order of the images."""


def modern(settings: BenchModernConfig) -> Report:
    """Tune the learning rates of both recipes on the first seed, run every row on every seed, and print the table."""
    log_to_stderr()
    bench = Bench(settings)
    rows = recipes(bench)
    for seed in range(settings.seeds):
        for name, changes in rows.items():
            bench.run(f"{name}, seed {seed}", changes, seed)
    runs = {name: [bench.run(name, changes, seed) for seed in range(settings.seeds)] for name, changes in rows.items()}
    summaries = {name: summary(of_name, runs["paper"]) for name, of_name in runs.items()}
    print("\n".join(table(summaries)))
    return {
        "settings": settings.model_dump(),
        "rates": {name: rows[name]["optim"] for name in ("paper", "modern")},
        **summaries,
    }


def recipes(bench: "Bench") -> dict[str, Report]:
    """For each row of the table, the settings that differ from the paper's recipe with default rates."""
    s = bench.settings
    lr = bench.tuned("paper, lr", lambda lr: {"optim": {"lr": lr}}, 3e-3)
    full = merged(*SWITCHES.values(), {"optim": {"lr": lr}})
    muon_lr = bench.tuned("modern, muon_lr", lambda x: merged(full, {"optim": {"muon_lr": x}}), 0.04)
    full = merged(full, {"optim": {"muon_lr": muon_lr}})
    adam_lr = bench.tuned("modern, lr", lambda x: merged(full, {"optim": {"lr": x}}), lr)
    full = merged(full, {"optim": {"lr": adam_lr}})
    paper: Report = {"optim": {"lr": lr}}
    rows = {
        "paper": paper,
        "modern": full,
        "modern, half the steps": merged(full, {"optim": {"steps": s.steps // 2}}),
    }
    for name in SWITCHES:
        rest = [switch for other, switch in SWITCHES.items() if other != name]
        rates: Report = {"lr": lr} if name == "Muon" else {"lr": adam_lr, "muon_lr": muon_lr}
        rows[f"modern - {name}"] = merged(*rest, {"optim": rates})
    for name, switch in SWITCHES.items():
        tuned = {"optim": {"muon_lr": muon_lr, "lr": adam_lr}} if name == "Muon" else {}
        rows[f"paper + {name}"] = merged(paper, switch, tuned)
    return rows


def merged(*changes: Report) -> Report:
    """All changes; where they conflict, the last one applies."""
    return {section: {k: v for c in changes for k, v in c.get(section, {}).items()} for section in ("model", "optim")}


class Bench:
    """Data and network size that all runs share, and the results of runs so far."""

    def __init__(self, settings: BenchModernConfig):
        torch.set_num_threads(1)
        self.settings = settings
        store = TokenStore.open(settings.tokens)
        self.images = SplitCache(store, settings.split)
        self.held_out = SplitCache(store, settings.held_out).views[0]
        sizes = {name: getattr(settings, name) for name in ("n_layer", "n_embd", "n_head")}
        self.model = ModelConfig(n_px=store.kind.n_px, n_vocab=store.kind.n_vocab, **sizes)
        self.out = Path(settings.out)
        self.results: dict[str, Report] = json.loads(self.out.read_text()) if self.out.exists() else {}

    def run(self, name: str, changes: Report, seed: int = 0) -> Report:
        """Train with `changes`, or return the stored result of the same run."""
        key = json.dumps({"seed": seed, **changes}, sort_keys=True)
        if key not in self.results:
            self.results[key] = self._train(changes, seed)
            self.out.write_text(json.dumps(self.results, indent=0))
            log.info("%s: %.4f nats per token, %.0f s", name, self.results[key]["nats"], self.results[key]["seconds"])
        return self.results[key]

    def tuned(self, name: str, changes: Callable[[float], Report], start: float) -> float:
        """The rate with the lowest held-out loss on the first seed."""
        return lowest(lambda rate: self.run(f"{name} {rate:g}", changes(rate))["nats"], start)

    def _train(self, changes: Report, seed: int) -> Report:
        s = self.settings
        model = ModelConfig.model_validate(self.model.model_dump() | changes.get("model", {}))
        recipe = {"batch_size": s.batch_size, "steps": s.steps, "warmup_steps": s.warmup_steps}
        opt = OptimConfig.model_validate(recipe | changes.get("optim", {}))
        started = time.perf_counter()
        torch.manual_seed(seed)
        network = ImageGPT(model)
        optimizer = optim.build(network, opt)
        curve: Curve = []
        for step in range(opt.steps):
            batch = self.images[global_batch(seed, step, opt.batch_size, len(self.images))]
            tokens = torch.from_numpy(batch.astype(np.int64))
            (losses.generative(network, tokens) / tokens.numel()).backward()
            optim.set_lr(optimizer, optim.lr_at(step, opt))
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % s.evaluate_every == 0 or step + 1 == opt.steps:
                nats = likelihood.image_nats(network, self.held_out, 64).mean() / model.n_positions
                curve.append((step + 1, float(nats)))
        return {
            "nats": curve[-1][1],
            "curve": curve,
            "steps": opt.steps,
            "flops_per_step": estimate.flops_per_step(model, opt, causal=False),
            "seconds": time.perf_counter() - started,
        }


def lowest(nats: Callable[[float], float], start: float) -> float:
    """Double and halve `start` for as long as `nats` falls, and return the rate with the fewest nats."""
    best = start
    for factor in (2.0, 0.5):
        while nats(best * factor) < nats(best):
            best *= factor
    return best


def reached(curve: Curve, nats: float) -> float | None:
    """First step at which a curve reaches `nats`, interpolated linearly between evaluations; None if it never does."""
    for (s0, n0), (s1, n1) in itertools.pairwise(curve):
        if n1 <= nats:
            return s0 + (s1 - s0) * (n0 - nats) / (n0 - n1)
    return None


def summary(runs: list[Report], paper: list[Report]) -> Report:
    """Means over seeds, with the steps and FLOPs to the final loss of the paper's recipe with the same seed."""
    steps = [reached(run["curve"], base["nats"]) for run, base in zip(runs, paper, strict=True)]
    known = [step for step in steps if step is not None]
    always = len(known) == len(runs)
    flops = float(np.mean(known)) * runs[0]["flops_per_step"] if always else None
    return {
        "nats": round(float(np.mean([run["nats"] for run in runs])), 4),
        "gain": round(float(np.mean([b["nats"] - r["nats"] for r, b in zip(runs, paper, strict=True)])), 4),
        "flops": runs[0]["steps"] * runs[0]["flops_per_step"],
        "steps_to_paper": round(float(np.mean(known)), 1) if always else None,
        "flops_to_paper": flops,
        "times_fewer_flops": round(paper[0]["steps"] * paper[0]["flops_per_step"] / flops, 2) if flops else None,
    }


def table(summaries: dict[str, Report]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| recipe | nats at the end | gain on the paper | FLOPs | steps to the paper's loss | FLOPs to it | fewer |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, f in summaries.items():
        reach = "never | | "
        if f["flops_to_paper"] is not None:
            reach = f"{f['steps_to_paper']:.0f} | {f['flops_to_paper']:.2e} | {f['times_fewer_flops']:.2f}x"
        lines.append(f"| {name} | {f['nats']:.4f} | {f['gain']:+.4f} | {f['flops']:.2e} | {reach} |")
    return lines
