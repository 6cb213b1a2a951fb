"""The report on a release: run the flow of every missing part, then put the results on one page.

<out>/report.html                the page
<out>/report.json  <out>/row.md  its figures, and a row of a Markdown table
<out>/likelihood/  <out>/probe/  <out>/completions/  <out>/finetuning/<run>/
                                 the output of evaluate, probe, complete and finetune, and part.json: the inputs and
                                 the result of the part's flow
"""

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import BaseModel

from igpt_ray import storage, weights
from igpt_ray.data import palette, pixels
from igpt_ray.data.token_store import TokenStore, tokens_of
from igpt_ray.errors import NotFound, SettingError
from igpt_ray.evaluate import report_page, report_plots
from igpt_ray.evaluate.config import EvaluateConfig, ProbeConfig
from igpt_ray.evaluate.report_page import Picture, Report
from igpt_ray.flows import batch, evaluate, finetune
from igpt_ray.flows.config import ReportConfig
from igpt_ray.flows.probe import check_splits, probe_layers
from igpt_ray.generate.config import CompleteConfig
from igpt_ray.model.config import ModelConfig
from igpt_ray.provenance import provenance
from igpt_ray.train.config import FinetuneConfig

log = logging.getLogger(__name__)

RANKED = 12
"""Images at either end of the ranking."""
MAX_COUNTED = 100_000
"""Maximum number of images that count models are fitted on: they run on the driver."""
NO_EFFECT = {"pool", "batch_size", "workers"}
"""Settings that affect no figure."""


def write_report(settings: ReportConfig) -> dict[str, Any]:
    """Compute the missing parts, then write report.html, report.json and row.md.

    Raises `SettingError` before any part if matplotlib is missing or the splits do not fit.
    """
    report_plots.check_installed()
    fit = [settings.fit_split] if settings.fit_split else []
    store = evaluate.open_store(settings.release, settings.tokens, settings.split, *fit)
    release = weights.load_config(settings.release)
    probe = _probe_config(settings, store) if fit else None
    if probe:
        check_splits(store, probe)
    if settings.finetune and not fit:
        raise SettingError("--finetune trains on --fit-split, which is empty: set it to a split with labels")
    tuned = {start: _finetune_config(settings, start) for start in report_page.TUNED if settings.finetune}
    for config in tuned.values():
        finetune.check(config)
    causal = release.model.objective == "next"
    counted = bool(fit) and causal and store.manifest.rows(settings.fit_split) <= MAX_COUNTED
    parts = Parts(settings.out, {"release": release.sha256, "tokens": store.sha256})
    swatches = pixels.png(palette.swatches(store.palette()))
    pictures = {"palette": [Picture(swatches, "Sorted by hue; each column from dark to bright.")]}
    likelihood = _likelihood(settings, parts, causal, settings.fit_split if counted else "")
    if causal:
        pictures |= _ranked(store, settings.split, likelihood) | _completions(settings, parts)
    report = {
        "release": settings.release,
        "tokens": settings.tokens,
        "split": settings.split,
        "network": release.model.model_dump() | {"n_params": release.model.n_params},
        "likelihood": likelihood,
        "probe": parts.cached("probe", probe, lambda: _run(probe_layers, probe, "probe.json")) if probe else None,
        "finetuned": {start: _finetuned(settings, parts, config) for start, config in tuned.items()},
        "left_out": _left_out(settings, release.model, probe, counted),
        "made_by": provenance(settings),
    }
    files = {
        "page": ("report.html", report_page.page(report, pictures)),
        "json": ("report.json", json.dumps(report, indent=1)),
        "row": ("row.md", report_page.row(report)),
    }
    for name, content in files.values():
        storage.write(storage.join(settings.out, name), content.encode())
    return {
        **report_page.headline(report),
        **{kind: storage.join(settings.out, name) for kind, (name, _) in files.items()},
        "made": parts.made,
    }


def _left_out(settings: ReportConfig, model: ModelConfig, probe: ProbeConfig | None, counted: bool) -> list[str]:
    """The sections that the page lacks, with reasons."""
    reasons = []
    if model.objective != "next":
        reasons.append("Completions, nats by position, ranked images: a masked network does not predict a next pixel.")
    if probe is None:
        reasons.append("Probes, fine-tuning and count models: --fit-split is empty.")
    else:
        if not settings.finetune:
            reasons.append("Fine-tuning: --finetune is not set.")
        too_many = [k for k in settings.low_data if k not in probe.low_data]
        reasons += [f"Probes with {k} labels a class: the smallest class has fewer images." for k in too_many]
        if model.objective == "next" and not counted:
            reasons.append(f"Count models: {settings.fit_split} has more than {MAX_COUNTED:,} images.")
    return reasons


class Parts:
    """Cache of the report's parts in one folder, keyed by the hashes of release and store and by settings."""

    def __init__(self, root: str, hashes: dict[str, str]):
        self.root = root
        self.hashes = hashes
        self.made: list[str] = []

    def uri(self, name: str) -> str:
        return storage.join(self.root, name)

    def cached(self, name: str, settings: BaseModel, make: Callable[[], Report], file: str = "part.json") -> Report:
        """The result of `make`, from this run or from an earlier run whose `file` still exists."""
        uri = storage.join(self.uri(name), "part.json")
        key = {**self.hashes, "settings": settings.model_dump(mode="json", exclude=NO_EFFECT)}
        try:
            part = json.loads(storage.read(uri))
            if part["about"] == key and storage.exists(storage.join(self.uri(name), file)):
                return dict(part["found"])
        except (NotFound, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            pass  # absent or damaged: computed again
        log.info("computing the part %s", name)
        result = make()
        storage.write(uri, json.dumps({"about": key, "found": result}, indent=1).encode())
        self.made.append(name)
        return result


# ------------------------------------------------------------------------------------------------ the parts


def _likelihood(settings: ReportConfig, parts: Parts, causal: bool, baselines: str) -> Report:
    config = _evaluate_config(settings, settings.release)
    if not causal:
        return parts.cached("likelihood", config, lambda: evaluate.evaluate(config).line())
    config = config.model_copy(update={"out": parts.uri("likelihood"), "baselines": baselines})
    return parts.cached("likelihood", config, lambda: _run(evaluate.evaluate, config, "likelihood.json"))


def _evaluate_config(settings: ReportConfig, release: str) -> EvaluateConfig:
    return EvaluateConfig(release=release, **_shared(settings, "tokens", "split", "batch_size", "pool"))


def _probe_config(settings: ReportConfig, store: TokenStore) -> ProbeConfig:
    """The numbers of labels are limited to those that every class has."""
    labels = np.concatenate([table["label"].to_numpy() for table in store.read_split(settings.fit_split)])
    smallest = np.bincount(labels[labels >= 0], minlength=len(store.manifest.classes)).min()
    return ProbeConfig(
        out=storage.join(settings.out, "probe"),
        low_data=tuple(k for k in settings.low_data if k <= smallest),
        baselines=True,
        **_shared(settings, "release", "tokens", "features", "fit_split", "split", "batch_size", "seed", "pool"),
    )


def _finetune_config(settings: ReportConfig, start: str) -> FinetuneConfig:
    config, scratch = settings.finetuning, start == "scratch"
    name = f"{config.run.name}-scratch" if scratch else config.run.name
    run = config.run.model_copy(update={"root": storage.join(settings.out, "finetuning"), "name": name})
    changed = {"run": run, "tune": config.tune.model_copy(update={"scratch": scratch})}
    inputs = {"release": settings.release, "tokens": settings.tokens, "split": settings.fit_split}
    return FinetuneConfig(**(_shared(config, *type(config).model_fields) | changed | inputs))


def _finetuned(settings: ReportConfig, parts: Parts, config: FinetuneConfig) -> Report:
    def make() -> Report:
        trained = finetune.finetune(config).line()
        result = evaluate.evaluate(_evaluate_config(settings, config.run.release)).line()
        return {**result, **result["classification"], **{k: trained[k] for k in ("best_step", "val_accuracy", "step")}}

    return parts.cached(storage.relative_to(settings.out, config.run.uri), config, make)


def _completions(settings: ReportConfig, parts: Parts) -> dict[str, list[Picture]]:
    shared = _shared(settings, "release", "tokens", "split", "images", "n", "seed", "pool")
    config = CompleteConfig(out=parts.uri("completions"), **shared)
    parts.cached("completions", config, lambda: batch.complete(config), "completions.png")
    figure = storage.read(storage.join(config.out, "completions.png"))
    caption = f"The upper half as prompt, {settings.n} completions, and the whole image in the colours of the palette."
    return {"completions": [Picture(figure, caption)]}


def _ranked(store: TokenStore, split: str, likelihood: Report) -> dict[str, list[Picture]]:
    """The images at either end of the ranking, in the colours of the palette."""
    ends = {end: ranked[:RANKED] for end, ranked in likelihood["ranking"].items()}
    keys = {image["key"] for ranked in ends.values() for image in ranked}
    n_px, colours, pngs = store.kind.n_px, store.palette(), dict[str, bytes]()
    for table in store.read_split(split):
        tokens = tokens_of(table)
        for row, key in enumerate(table["key"].to_pylist()):
            if key in keys:
                pngs[key] = pixels.png(colours.decode(tokens[row]).reshape(n_px, n_px, 3))
    return {
        end: [Picture(pngs[image["key"]], f"{image['nats_per_token']:.3f} {image['key']}") for image in ranked]
        for end, ranked in ends.items()
    }


def _shared(settings: BaseModel, *names: str) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names}


def _run(flow: Callable[[Any], object], config: EvaluateConfig | ProbeConfig, name: str) -> Report:
    """Run a flow and return the JSON file that it writes."""
    flow(config)
    return dict(json.loads(storage.read(storage.join(config.out, name))))
