"""The report on a release: the parts that are missing are made by their own flows, then all go onto one page.

<out>/report.html                the page
<out>/report.json  <out>/row.md  its figures, and a row of a Markdown table
<out>/likelihood/  <out>/probe/  <out>/completions/  <out>/finetuning/<run>/
                                 what evaluate, probe, complete and finetune write, and part.json: what the part was
                                 made of and what its flow returned
"""

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import BaseModel

from igpt_ray import storage, weights
from igpt_ray.data import palette, pixels
from igpt_ray.data.token_store import TokenStore, tokens_of
from igpt_ray.errors import NotFound, SettingError
from igpt_ray.evaluate import report_page
from igpt_ray.evaluate.config import EvaluateConfig, ProbeConfig
from igpt_ray.evaluate.likelihood import heat_map
from igpt_ray.evaluate.report_page import Found
from igpt_ray.evaluate.report_plots import Picture
from igpt_ray.flows import batch, evaluate, finetune
from igpt_ray.flows.config import ReportConfig
from igpt_ray.flows.probe import check_splits, probe_layers
from igpt_ray.generate.config import CompleteConfig
from igpt_ray.model.config import ModelConfig
from igpt_ray.provenance import provenance
from igpt_ray.train.config import FinetuneConfig

log = logging.getLogger(__name__)

SHOWN = 12
"""Images at either end of the ranking."""
COUNTED = 100_000
"""Images that count models are fitted on, at most: they count on the driver."""
UNMADE = {"pool", "batch_size", "workers"}
"""Settings that change no number."""


def write_report(settings: ReportConfig) -> dict[str, Any]:
    """Make what is missing, then report.html, report.json and row.md."""
    started = time.perf_counter()
    fit = [settings.fit_split] if settings.fit_split else []
    store = evaluate.open_store(settings.release, settings.tokens, settings.split, *fit)
    about = weights.load_config(settings.release)
    probed = _probe(settings, store) if fit else None
    if probed:
        check_splits(store, probed)
    if settings.finetune and not fit:
        raise SettingError("--finetune trains on --fit-split, which is empty: name a split with labels")
    tuned = {start: _finetune(settings, start == "scratch") for start in report_page.TUNED if settings.finetune}
    for wanted in tuned.values():
        finetune.check(wanted)
    counted = fit and about.model.objective == "next" and store.manifest.rows(settings.fit_split) <= COUNTED
    parts = Parts(settings.out, {"release": about.sha256, "tokens": store.sha256})
    pictures = {
        "palette": [Picture(pixels.png(palette.swatches(store.palette())), "By hue, each column dark to bright.")]
    }
    if about.model.objective == "next":
        likelihood = _likelihood(settings, parts, bool(counted))
        pictures |= _pictures(store, settings.split, likelihood) | _completions(settings, parts)
    else:
        likelihood = _masked_nats(settings, parts)
    found = {
        "release": settings.release,
        "tokens": settings.tokens,
        "split": settings.split,
        "network": about.model.model_dump() | {"n_params": about.model.n_params},
        "likelihood": likelihood,
        "probe": parts.cached("probe", probed, lambda: _probed(probed)) if probed else None,
        "finetuned": {name: _finetuned(settings, parts, wanted) for name, wanted in tuned.items()},
        "left_out": _left_out(settings, about.model, probed, bool(counted)),
        "made_by": provenance(settings),
    }
    places = _write(settings.out, found, pictures)
    return {
        **report_page.headline(found),
        **places,
        "made": parts.made,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _left_out(settings: ReportConfig, model: ModelConfig, probed: ProbeConfig | None, counted: bool) -> list[str]:
    """What the page does not say, and why."""
    reasons = []
    if model.objective != "next":
        reasons.append("Completions, surprise by position, likeliest images: a masked network has no next pixel.")
    if probed is None:
        reasons.append("Probes, fine-tuning and count models: no --fit-split is named.")
    else:
        if not settings.finetune:
            reasons.append("Fine-tuning: --finetune is not set.")
        few = [k for k in settings.low_data if k not in probed.low_data]
        reasons += [f"Probes with {k} labels a class: the smallest class has fewer images." for k in few]
        if model.objective == "next" and not counted:
            reasons.append(f"Count models: {settings.fit_split} has more than {COUNTED:,} images.")
    return reasons


class Parts:
    """Parts of the report under one folder; each is made once, for one release, store and settings."""

    def __init__(self, root: str, marks: dict[str, str]):
        self.root = root
        self.marks = marks
        self.made: list[str] = []

    def place(self, name: str) -> str:
        return storage.join(self.root, name)

    def cached(self, name: str, settings: BaseModel, make: Callable[[], Found], file: str = "part.json") -> Found:
        """What `make` returned, now or in an earlier run that left `file`."""
        said = settings.model_dump(mode="json", exclude=UNMADE)
        uri, about = storage.join(self.place(name), "part.json"), {**self.marks, "settings": said}
        try:
            there = json.loads(storage.read(uri))
            if there["about"] == about and storage.exists(storage.join(self.place(name), file)):
                return dict(there["found"])
        except (NotFound, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            pass  # absent or damaged: either way it is made again
        log.info("making the part %s", name)
        found = make()
        storage.write(uri, json.dumps({"about": about, "found": found}, indent=1).encode())
        self.made.append(name)
        return found


# ------------------------------------------------------------------------------------------------ the parts


def _likelihood(settings: ReportConfig, parts: Parts, counted: bool) -> Found:
    place = parts.place("likelihood")
    wanted = _evaluate(settings).model_copy(update={"out": place, "baselines": settings.fit_split if counted else ""})

    def make() -> Found:
        evaluate.evaluate(wanted)
        return _json(storage.join(place, "likelihood.json"))

    return parts.cached("likelihood", wanted, make)


def _masked_nats(settings: ReportConfig, parts: Parts) -> Found:
    return parts.cached("likelihood", _evaluate(settings), lambda: evaluate.evaluate(_evaluate(settings)))


def _evaluate(settings: ReportConfig) -> EvaluateConfig:
    return EvaluateConfig(
        release=settings.release,
        tokens=settings.tokens,
        split=settings.split,
        batch_size=settings.batch_size,
        pool=settings.pool,
    )


def _probe(settings: ReportConfig, store: TokenStore) -> ProbeConfig:
    """Of the numbers of labels, those that every class has."""
    labels = np.concatenate([table["label"].to_numpy() for table in store.read_split(settings.fit_split)])
    smallest = np.bincount(labels[labels >= 0], minlength=len(store.manifest.classes)).min()
    return ProbeConfig(
        release=settings.release,
        tokens=settings.tokens,
        out=storage.join(settings.out, "probe"),
        features=settings.features,
        fit_split=settings.fit_split,
        split=settings.split,
        low_data=tuple(k for k in settings.low_data if k <= smallest),
        baselines=True,
        batch_size=settings.batch_size,
        seed=settings.seed,
        pool=settings.pool,
    )


def _probed(wanted: ProbeConfig) -> Found:
    probe_layers(wanted)
    return _json(storage.join(wanted.out, "probe.json"))


def _finetune(settings: ReportConfig, scratch: bool) -> FinetuneConfig:
    how = settings.finetuning
    name = f"{how.run.name}-scratch" if scratch else how.run.name
    run = how.run.model_copy(update={"root": storage.join(settings.out, "finetuning"), "name": name})
    changed = {"run": run, "tune": how.tune.model_copy(update={"scratch": scratch})}
    same = {name: getattr(how, name) for name in type(how).model_fields}
    where = {"release": settings.release, "tokens": settings.tokens, "split": settings.fit_split}
    return FinetuneConfig(**(same | changed | where))


def _finetuned(settings: ReportConfig, parts: Parts, wanted: FinetuneConfig) -> Found:
    def make() -> Found:
        trained = finetune.finetune(wanted)
        judged = evaluate.evaluate(_evaluate(settings).model_copy(update={"release": wanted.run.release}))
        return {**judged, **judged["classification"], **{k: trained[k] for k in ("best_step", "val_accuracy", "step")}}

    return parts.cached(storage.relative_to(settings.out, wanted.run.uri), wanted, make)


def _completions(settings: ReportConfig, parts: Parts) -> dict[str, list[Picture]]:
    wanted = CompleteConfig(
        release=settings.release,
        tokens=settings.tokens,
        out=parts.place("completions"),
        split=settings.split,
        images=settings.images,
        n=settings.n,
        seed=settings.seed,
        pool=settings.pool,
    )
    parts.cached("completions", wanted, lambda: batch.complete(wanted), "completions.png")
    figure = storage.read(storage.join(wanted.out, "completions.png"))
    caption = f"The given half, {settings.n} completions of it, and the whole picture as the network sees it."
    return {"completions": [Picture(figure, caption)]}


def _pictures(store: TokenStore, split: str, likelihood: Found) -> dict[str, list[Picture]]:
    """The surprise map, and the images at either end of the ranking."""
    by_position, n_px = np.array(likelihood["by_position"]), store.kind.n_px
    caption = "Nats per token at each pixel, by row and column: where an image costs most."
    drawn = {"surprise": [Picture(pixels.png(heat_map(by_position.ravel(), n_px, 1)), caption)]}
    ends = {end: ranked[:SHOWN] for end, ranked in likelihood["ranking"].items()}
    pngs = _pngs(store, split, {image["key"] for ranked in ends.values() for image in ranked})
    for end, ranked in ends.items():
        drawn[end] = [Picture(pngs[i["key"]], f"{i['nats_per_token']:.3f} {i['key']}") for i in ranked]
    return drawn


def _pngs(store: TokenStore, split: str, keys: set[str]) -> dict[str, bytes]:
    """Key -> the picture as the network sees it."""
    n_px, colours, found = store.kind.n_px, store.palette(), dict[str, bytes]()
    for table in store.read_split(split):
        here = {key: row for row, key in enumerate(table["key"].to_pylist()) if key in keys}
        tokens = tokens_of(table)
        found |= {key: pixels.png(colours.decode(tokens[row]).reshape(n_px, n_px, 3)) for key, row in here.items()}
    return found


def _json(uri: str) -> Found:
    return dict(json.loads(storage.read(uri)))


def _write(out: str, found: Found, pictures: dict[str, list[Picture]]) -> dict[str, str]:
    files = {
        "page": ("report.html", report_page.page(found, pictures)),
        "json": ("report.json", json.dumps(found, indent=1)),
        "row": ("row.md", report_page.row(found)),
    }
    places = {name: storage.join(out, file) for name, (file, _) in files.items()}
    for name, (_, content) in files.items():
        storage.write(places[name], content.encode())
    return places
