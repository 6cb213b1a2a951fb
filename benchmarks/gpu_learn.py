"""CIFAR-10 on one GPU in commands of nine minutes: pretraining, linear probe, fine-tuning and completions.

    python -m benchmarks.gpu_learn --images CIFAR-FOLDERS --packed packed --seconds 0      packs the images, 18 MB
    python benchmarks/gpu_learn.py --packed packed --out one --work W --phases modern paper probe sheet
    python benchmarks/gpu_learn.py --packed packed --out two --work W --phases finetune

The second call starts from the release in W, or from the parts in `one` with `--release one`. Needs neither Ray, faiss,
boto3 nor a network. Tokens are prepared from the images by the project's own pipeline. The number of steps of a phase
follows from the measured speed, so that the schedule of the learning rate ends in time.

Both recipes train the same network for the same steps, on the same images in the same order. Their batch, warm-up (a
tenth of the steps instead of the paper's epoch) and clipping at norm 1 are the same. Muon adds 1 % of FLOPs. The
network has 22M parameters (12 layers x 384): in 190 s of an H200, about 5e16 FLOPs, larger networks see an image less
than five times, and smaller ones have narrower features.

Predictions for an H200: 2M tokens/s. First call: 2,700 steps (7 epochs); 2.25 (modern) and 2.35 (paper) nats per token;
probe of the best layer 70 % and 64 %, of five layers with mirror images 74 %. Second call: 6,800 steps (18 epochs),
fine-tuned accuracy 87 %, with mirror images 88 %.
"""

import dataclasses
import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import tyro
from pydantic import Field

from benchmarks import cifar, release_parts
from benchmarks import learn_evaluation as evaluation
from igpt_ray import storage, weights
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import SettingError
from igpt_ray.provenance import provenance
from igpt_ray.settings import Count, OptionalUri, Section, Uri
from igpt_ray.train import metrics
from igpt_ray.train.alone import train_alone
from igpt_ray.train.config import DataConfig, FinetuneConfig, PretrainConfig, RunConfig, TuneConfig, WorkersConfig
from igpt_ray.train.presets import PRESETS

log = logging.getLogger(__name__)

Report = dict[str, Any]
Phase = Literal["modern", "paper", "probe", "finetune", "sheet"]

PRESET_OF = {"paper": "igpt-s", "modern": "igpt-s-modern"}
"""Recipe -> the preset whose optimiser and modern settings it has."""
SHARES: dict[str, float] = {"modern": 0.28, "paper": 0.28, "finetune": 0.44}
"""Shares of the time for training."""
STARTUP_S = 25.0
"""Time reserved for the start of a training phase: compilation and the measurement of its speed."""
EVALUATION_S = {"probe": 90.0, "finetune": 15.0, "sheet": 10.0}
"""Time reserved for evaluations of a phase."""
SPEED_STEPS = 30
"""Steps of the speed measurement; only the last third counts."""
SAFETY = 0.94
"""Share of the time that training steps are planned for."""


class LearnConfig(Section):
    """Pretrain, probe and fine-tune on CIFAR-10 within a number of seconds."""

    packed: Uri = storage.absolute("build/cifar10")
    """URI of a folder with the packed images: train.parquet, test.parquet and classes.txt."""
    images: OptionalUri = ""
    """Folder with <split>/<class>/<image>.jpg to pack into `packed` first; empty if it is packed."""
    out: Uri = storage.absolute("build/gpu-learn")
    """Folder for learn.json, sheet.png and the releases in parts."""
    work: Uri = storage.absolute("build/gpu-learn-work")
    """Folder for token stores and runs. Another call reuses its token stores."""
    seconds: Annotated[float, Field(ge=0)] = 540
    """Time for everything; 0 only packs."""
    phases: tuple[Phase, ...] = ("modern", "paper", "probe", "finetune", "sheet")
    """Phases to run, in order. The first recipe determines the steps of both: modern, which is slower, comes first."""
    release: OptionalUri = ""
    """Folder with a release, or with modern.part* of an earlier call, to start from if the phase modern is not run."""
    n_layer: Count = 12
    """Blocks of the network."""
    n_embd: Count = 384
    """Width of the network."""
    n_head: Count = 6
    """Attention heads of the network."""
    n_px: Count = 32
    """Pixels a side."""
    batch_size: Count = 128
    """Images per step, and per forward pass."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate of Adam in pretraining."""
    muon_lr: Annotated[float, Field(gt=0)] = 0.02
    """Peak learning rate of Muon in pretraining."""
    finetune_lr: Annotated[float, Field(gt=0)] = 1.5e-3
    """Peak learning rate of Adam in fine-tuning; Muon's is in the proportion of pretraining."""
    views: Count = 4
    """Random views of each training image (shifted and mirrored) in pretraining."""
    val_images: Count = 1920
    """Held-out images for the curves: a multiple of the batch, so that a compiled network sees one shape."""
    steps: Count | None = None
    """Steps of every training phase; None for as many as the time allows."""


# ------------------------------------------------------------------------------------------------ training


def pretrain_config(s: LearnConfig, recipe: str, tokens: TokenStore, steps: int, compiled: bool) -> PretrainConfig:
    """The settings of a recipe. The recipes differ in the optimiser, its schedule, QK-norm and rotary positions."""
    preset = PRESETS[PRESET_OF[recipe]][1]
    size = {"n_layer": s.n_layer, "n_embd": s.n_embd, "n_head": s.n_head}
    model = preset.model.model_copy(update=size | {"n_px": tokens.kind.n_px, "n_vocab": tokens.kind.n_vocab})
    optim = preset.optim.model_copy(update={"lr": s.lr, **_schedule(s, steps)})
    if optim.muon_lr is not None:
        optim = optim.model_copy(update={"muon_lr": s.muon_lr})
    data = DataConfig(tokens=tokens.root, split="train", val_split="holdout", val_images=s.val_images)
    workers, run = _workers(s, compiled), _run(s, recipe, steps)
    return PretrainConfig(model=model, optim=optim, data=data, workers=workers, run=run)


def finetune_config(s: LearnConfig, release: str, tokens: TokenStore, steps: int, compiled: bool) -> PretrainConfig:
    """Fine-tuning with Muon and the paper's augmentation. The release is of the best evaluation on the hold-out."""
    muon_lr = s.finetune_lr * s.muon_lr / s.lr
    optim: Report = {"lr": s.finetune_lr, "muon_lr": muon_lr, "schedule": "warmup_stable_decay"}
    settings = FinetuneConfig(
        release=release,
        tokens=tokens.root,
        val_images=s.val_images,
        tune=TuneConfig(pad=s.n_px // 8, patience=10**6),
        optim=FinetuneConfig.model_fields["optim"].default.model_copy(update=optim | _schedule(s, steps)),
        workers=_workers(s, compiled),
        run=_run(s, "finetune", steps),
    )
    model = weights.load_config(release).model
    return settings.training(model.model_copy(update={"n_class": len(tokens.manifest.classes)}))


def _schedule(s: LearnConfig, steps: int) -> Report:
    return {"batch_size": s.batch_size, "steps": steps, "warmup_steps": max(1, steps // 10), "clip": 1.0}


def _workers(s: LearnConfig, compiled: bool) -> WorkersConfig:
    on_gpu = torch.cuda.is_available()
    precision: Report = {"precision": "bfloat16"} if on_gpu else {}
    return WorkersConfig(gpus=int(on_gpu), micro_batch=s.batch_size, compile=compiled, **precision)


def _run(s: LearnConfig, name: str, steps: int) -> RunConfig:
    """The folder of a run, with one checkpoint, at the end, and eight evaluations."""
    root, often = storage.join(s.work, "runs"), max(1, steps // 8)
    return RunConfig(root=root, name=name, log_every=10, checkpoint_every=steps, validate_every=often, keep=1)


def trained(cfg: PretrainConfig, device: torch.device) -> Report:
    """Train from the start, and return the last metrics with the curve of the held-out images."""
    shutil.rmtree(cfg.run.uri, ignore_errors=True)  # of an earlier call, which this one would resume
    started = time.perf_counter()
    report = train_alone(cfg, device)
    lines = metrics.read(cfg.run.uri)
    curve = [{k: v for k, v in line.items() if k == "step" or k.startswith("val_")} for line in lines]
    return {
        **report,
        "seconds": time.perf_counter() - started,
        "curve": [line for line in curve if len(line) > 1],
        "settings": cfg.model_dump(mode="json", include={"model", "optim", "workers"}),
    }


def speed(config: Callable[[int, bool], PretrainConfig], device: torch.device) -> tuple[float, bool]:
    """Steps per second of the configuration after a start, and whether it is compiled.

    Logs a warning, and measures without compilation, if the compiled network fails.
    """
    cfg = config(SPEED_STEPS, device.type == "cuda")
    run = cfg.run.model_copy(update={"name": f"{cfg.run.name}-speed", "validate_every": SPEED_STEPS // 3})
    cfg = cfg.model_copy(update={"run": run})
    report = None
    try:
        report = trained(cfg, device)
    except Exception:
        if not cfg.workers.compile:
            raise
        log.warning("training failed with torch.compile, continuing without it:\n%s", traceback.format_exc())
    if report is None:  # outside of the handler, whose traceback refers to the first network's memory
        cfg = cfg.model_copy(update={"workers": cfg.workers.model_copy(update={"compile": False})})
        report = trained(cfg, device)
    training = 1 - report["evaluation"] - report["checkpoint_stall"]  # share of the time since the line before
    tokens_per_step = cfg.optim.batch_size * cfg.model.n_positions
    return report["tokens_per_second"] / (training * tokens_per_step), cfg.workers.compile is True


# ------------------------------------------------------------------------------------------------ phases


@dataclasses.dataclass
class Learn:
    """The phases of one call. Each phase adds its result to learn.json at once; a phase that fails is reported there,
    and the next one runs."""

    s: LearnConfig
    device: torch.device
    deadline: float
    views: TokenStore
    images: TokenStore
    results: Report
    releases: dict[str, str]
    """Recipe -> URI of its release."""
    planned: tuple[int, bool] | None = None
    """Steps of pretraining, and whether it is compiled: both recipes have the same."""

    def run(self, phase: Phase) -> None:
        started = time.perf_counter()
        try:
            result: Report = getattr(self, phase)()
        except Exception as error:  # the results of the other phases are kept
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        self.results[phase] = {"phase_seconds": round(time.perf_counter() - started, 1), **result}
        storage.write(storage.join(self.s.out, "learn.json"), json.dumps(self.results, indent=1).encode())
        brief = {k: v for k, v in self.results[phase].items() if k not in ("settings", "curve", "confusion")}
        print(json.dumps({phase: brief}), flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def time_for(self, phase: Phase, now: float) -> float:
        """Seconds for the training steps of `phase`: its share of the time without reserves of the phases to come."""
        left = [p for p in self.s.phases if p not in self.results]
        reserved = sum(EVALUATION_S.get(p, 0) for p in left) + STARTUP_S * sum(p in SHARES for p in left if p != phase)
        shares = sum(SHARES[p] for p in left if p in SHARES)
        return max(0.0, self.deadline - now - reserved) * SHARES[phase] / shares

    def steps(self, phase: Phase, config: Callable[[int, bool], PretrainConfig]) -> tuple[int, bool]:
        """The steps that the time for `phase` allows at the measured speed, and whether to compile."""
        steps_per_second, compiled = speed(config, self.device)
        return self.s.steps or max(
            10, int(self.time_for(phase, time.perf_counter()) * steps_per_second * SAFETY)
        ), compiled

    def pretrain(self, recipe: Phase) -> Report:
        def config(steps: int, compiled: bool) -> PretrainConfig:
            return pretrain_config(self.s, recipe, self.views, steps, compiled)

        self.planned = self.planned or self.steps(recipe, config)
        cfg = config(*self.planned)
        report = trained(cfg, self.device)
        self.releases[recipe] = cfg.run.release
        return report | {"test_nats_per_token": evaluation.nats_per_token(cfg.run.release, self.images, self.device)}

    def modern(self) -> Report:
        report = self.pretrain("modern")
        return report | {"parts": release_parts.write_parts(self.releases["modern"], self.s.out, "modern")}

    def paper(self) -> Report:
        return self.pretrain("paper")

    def probe(self) -> Report:
        return {
            recipe: evaluation.probe_release(uri, self.images, self.device, mirror=recipe == "modern")
            for recipe, uri in self.releases.items()
        }

    def pretrained(self) -> str:
        """URI of the modern release. Raises `SettingError` if there is none."""
        if "modern" not in self.releases:
            raise SettingError("no release of the recipe modern: add the phase modern before, or set --release")
        return self.releases["modern"]

    def finetune(self) -> Report:
        release = self.pretrained()

        def config(steps: int, compiled: bool) -> PretrainConfig:
            return finetune_config(self.s, release, self.images, steps, compiled)

        cfg = config(*self.steps("finetune", config))
        report = trained(cfg, self.device) | evaluation.classification(cfg.run.release, self.images, self.device)
        return report | {"parts": release_parts.write_parts(cfg.run.release, self.s.out, "finetuned")}

    def sheet(self) -> Report:
        png = evaluation.sheet(self.pretrained(), self.images, self.device)
        storage.write(storage.join(self.s.out, "sheet.png"), png)
        return {"bytes": len(png)}


def learn(s: LearnConfig) -> Report:
    """Run the phases, and return their results, which are also in learn.json."""
    deadline = time.perf_counter() + s.seconds
    results: Report = {"packed": cifar.pack(s.images, s.packed)} if s.images else {}
    if not s.seconds:
        return results
    started = time.perf_counter()
    views = cifar.unpack(s.packed, s.work, s.n_px, "random", s.views)
    images = cifar.unpack(s.packed, s.work, s.n_px, "centre")
    results |= {"data_seconds": round(time.perf_counter() - started, 1), **provenance(s)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    phases = Learn(s, device, deadline, views, images, results, releases_of(s))
    for phase in s.phases:
        phases.run(phase)
    return results


def releases_of(s: LearnConfig) -> dict[str, str]:
    """Recipe -> release of an earlier call, from `release` or from the runs in `work`."""
    runs = {recipe: storage.join(s.work, "runs", recipe, "release") for recipe in PRESET_OF}
    existing = {recipe: uri for recipe, uri in runs.items() if storage.exists(storage.join(uri, "config.json"))}
    return existing | ({"modern": release_parts.join_parts(s.release, "modern", s.work)} if s.release else {})


def learn_part(part: Any) -> None:
    """The part `learn` of `benchmarks.gpu`, with the default settings; `--only` names its phases."""
    small = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_px": 8, "batch_size": 16, "steps": 5} if part.toy else {}
    phases = {"phases": tuple(part.only)} if part.only else {}
    settings = LearnConfig.model_validate({"out": str(part.out), "seconds": part.seconds_left} | small | phases)
    for name, result in learn(settings).items():
        part.add(name, result)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    learn(tyro.cli(LearnConfig))
