"""Probes of every layer, spread over actors: features -> the layer that held-out images choose -> one look at the test.

<out>/probe.json         accuracies of the network and of what stands beside it, and how each was come by
<out>/confusion.csv      test images by true class (rows) and chosen class (columns)
<out>/classifier.npz     mean, deviation, weight and bias of the best layer's classifier; what it is fitted on
"""

import csv
import io
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from igpt_ray import storage, weights
from igpt_ray.data.token_store import TokenStore, tokens_of
from igpt_ray.errors import SettingError
from igpt_ray.evaluate import features, few_shot, linear_probe
from igpt_ray.evaluate.config import FeaturesConfig, ProbeConfig
from igpt_ray.evaluate.features import Features, FeatureStore, Labels
from igpt_ray.evaluate.linear_probe import Choice, Labelled, Method
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.flows.evaluate import device, open_store
from igpt_ray.flows.features import extract
from igpt_ray.provenance import provenance

log = logging.getLogger(__name__)

NETWORK, UNTRAINED, PIXELS = "network", "untrained", "raw_pixels"
Report = dict[str, Any]


class Choose(NamedTuple):
    """What do the held-out images say of these layers, side by side?"""

    source: str
    layers: tuple[int, ...]


class Judge(NamedTuple):
    """Fit the choice on all fitting images, and look at the test images."""

    source: str
    layers: tuple[int, ...]
    choice: Choice


class Few(NamedTuple):
    """The same with k labels a class."""

    source: str
    layers: tuple[int, ...]
    k: int


def probe_layers(settings: ProbeConfig) -> Report:
    """Accuracy of the best layer, and of what was asked for beside it: neighbours together, few labels, baselines."""
    started = time.perf_counter()
    store = open_store(settings.release, settings.tokens, settings.fit_split, settings.split)
    check_splits(store, settings)
    roots = _extracted(settings)
    layers = [(layer,) for layer in FeatureStore(roots[NETWORK]).spec.layers]
    tasks = [Choose(source, layer) for source in roots for layer in layers]
    tasks += [Choose(PIXELS, ())] if settings.baselines else []
    choices = _answers(tasks, settings, roots)
    best = _best_layers(choices)
    judged = list(best.items())
    if settings.concatenate:
        around = _around(best[NETWORK][0], settings.concatenate, [layer for (layer,) in layers])
        choices |= _answers([Choose(NETWORK, around)], settings, roots)
        judged.append((NETWORK, around))
    looks: list[Any] = [Judge(source, ls, choices[Choose(source, ls)]) for source, ls in judged]
    looks += [Few(source, ls, k) for k in settings.low_data for source, ls in best.items()]
    found = _answers(looks, settings, roots)
    report = _report(settings, choices, best, found)
    if settings.concatenate:
        look = looks[len(best)]
        report["concatenated"] = {"layers": list(around), **_said(look.choice), **found[look].report}
    _write(settings, store, report, found[looks[list(best).index(NETWORK)]])
    return {**report, "seconds": round(time.perf_counter() - started, 2)}


def _extracted(settings: ProbeConfig) -> dict[str, str]:
    """The features of both splits, made where they are missing: source -> folder."""
    wanted = FeaturesConfig(
        release=settings.release,
        tokens=settings.tokens,
        out=settings.features or storage.join(settings.out, "features"),
        splits=(settings.fit_split, settings.split),
        layers=settings.layers,
        pooling=settings.pooling,
        precision=settings.precision,
        batch_size=settings.batch_size,
        pool=settings.pool,
    )
    roots = {NETWORK: extract(wanted)["features"]}
    if settings.baselines:
        place = {"out": f"{wanted.out}-untrained", "untrained": settings.seed}
        roots[UNTRAINED] = extract(wanted.model_copy(update=place))["features"]
    return roots


def _answers(tasks: list[Any], settings: ProbeConfig, roots: dict[str, str]) -> dict[Any, Any]:
    answers = {}
    given = {"settings": settings, "roots": roots}
    for task, answer in zip(tasks, actor_map(tasks, Prober, given, settings.pool), strict=True):
        answers[task] = answer
        if isinstance(answer, Choice):
            log.info("%s %s: %.1f %% of held-out images", task.source, task.layers or "", 100 * answer.validation)
    return answers


def _best_layers(choices: dict[Choose, Choice]) -> dict[str, tuple[int, ...]]:
    """Source -> the layer that held-out images like best; of equals the first."""
    best: dict[str, Choose] = {}
    for task, choice in choices.items():
        if task.source not in best or choice.validation > choices[best[task.source]].validation:
            best[task.source] = task
    return {source: task.layers for source, task in best.items()}


def _around(best: int, n: int, layers: list[int]) -> tuple[int, ...]:
    """n neighbouring layers, the best in their midst unless it stands at an end."""
    start = min(max(0, layers.index(best) - n // 2), max(0, len(layers) - n))
    return tuple(layers[start : start + n])


def check_splits(store: TokenStore, settings: ProbeConfig) -> None:
    """Before hours of features: the test images are others, every image has a label, every class as many as wanted."""
    if both := set(settings.fit_split.split("+")) & set(settings.split.split("+")):
        raise SettingError(f"the split {both.pop()} is in --fit-split and in --split: report on images not fitted on")
    fit, test = (_labels(store, split) for split in (settings.fit_split, settings.split))
    linear_probe.check_labels(fit)
    linear_probe.check_labels(test)
    linear_probe.check_classes(fit)
    for k in settings.low_data:
        few_shot.draw(fit, k, store.manifest.classes, (settings.seed, 0))


def _labels(store: TokenStore, split: str) -> Labels:
    return np.concatenate([table["label"].to_numpy() for table in store.read_split(split)]).astype(np.int64)


# ------------------------------------------------------------------------------------------------ on an actor


class ProbeResult(NamedTuple):
    report: dict[str, float]
    confusion: np.ndarray
    linear: Any


class Prober:
    """Choose -> Choice, Judge -> ProbeResult, Few -> accuracies by classifier."""

    def __init__(self, settings: ProbeConfig, roots: dict[str, str]):
        self.settings = settings
        self.roots = roots
        self.store = TokenStore.open(settings.tokens)
        self.method = Method(settings.method, settings.sgd, settings.seed, device())

    def __call__(self, task: Choose | Judge | Few) -> Any:
        classes, seed = self.store.manifest.classes, self.settings.seed
        with tempfile.TemporaryDirectory() as folder:
            fit = self.labelled(task.source, task.layers, self.settings.fit_split, folder)
            if isinstance(task, Choose):
                return linear_probe.select(fit, len(classes), seed, self.method)
            test = self.labelled(task.source, task.layers, self.settings.split, folder)
            if isinstance(task, Few):
                return few_shot.few_labels(fit, test, task.k, classes, seed)
            linear = linear_probe.refit(fit, len(classes), task.choice.setting, self.method)
            return ProbeResult(*linear_probe.summary(linear, test, len(classes)), linear)

    def labelled(self, source: str, layers: tuple[int, ...], split: str, folder: str) -> Labelled:
        """Features of some layers side by side; for SGD in a file on this node's disk, whatever their size."""
        if source == PIXELS:
            return raw_pixels(self.store, split)
        kept = FeatureStore(self.roots[source])
        *looks, C = kept.spec.shape
        shape = (kept.rows(split), *looks, C * len(layers))
        on_disk = self.settings.method == "sgd"
        file = Path(folder, f"{split}.f32")
        x = np.memmap(file, np.float32, "w+", shape=shape) if on_disk else np.empty(shape, np.float32)
        for i, layer in enumerate(layers):
            labels = features.fill(x[..., i * C : (i + 1) * C], kept.read(split, layer))
        return Labelled(x, labels)


def raw_pixels(store: TokenStore, split: str) -> Labelled:
    """The quantised picture itself as features: (N, T * 3) in [0, 1]."""
    palette = store.palette()
    parts = [palette.decode(tokens_of(table)).reshape(table.num_rows, -1) for table in store.read_split(split)]
    pixels: Features = np.concatenate(parts, dtype=np.float32)
    pixels /= 255
    return Labelled(pixels, _labels(store, split))


# ------------------------------------------------------------------------------------------------ the report


def _report(
    settings: ProbeConfig,
    choices: dict[Choose, Choice],
    best: dict[str, tuple[int, ...]],
    found: dict[Any, Any],
) -> Report:
    """The network's figures first; those of the baselines under their names."""
    by_source: dict[str, Report] = {}
    for source, layers in best.items():
        choice = choices[Choose(source, layers)]
        judged = found[Judge(source, layers, choice)]
        said = {**_said(choice), **judged.report}
        if layers:
            tried = [
                (task.layers[0], c) for task, c in choices.items() if task.source == source and len(task.layers) == 1
            ]
            said |= {"best_layer": layers[0], "layers": [{"layer": layer, **_said(c)} for layer, c in tried]}
        few = {str(k): found[Few(source, layers, k)] for k in settings.low_data}
        if few:
            said["low_data"] = {
                k: {name: few_shot.mean_and_sd(runs) for name, runs in by_name.items()} for k, by_name in few.items()
            }
        by_source[source] = said
    network = by_source.pop(NETWORK)
    return {"release": settings.release, "out": settings.out, "split": settings.split, **network, **by_source}


def _said(choice: Choice) -> dict[str, float]:
    return {"validation": choice.validation, "setting": choice.setting}


def _protocol(settings: ProbeConfig, store: TokenStore) -> Report:
    """How figures were come by, where the paper leaves it open."""
    n = store.manifest.rows(settings.fit_split)
    return {
        "method": settings.method,
        "setting": "l2 / 2 * |W|^2 added to the mean loss" if settings.method == "lbfgs" else "learning rate",
        "tried": list(Method(settings.method, settings.sgd).candidates),
        "standardised": "by mean and deviation of the images fitted on",
        "fit_split": settings.fit_split,
        "fit_images": n,
        "held_out_images": len(linear_probe.held_out(n, settings.seed)[1]),
        "held_out_rows": f"i of np.random.default_rng({settings.seed}).permutation({n}) % {linear_probe.HELD_OUT} == 0",
        "test_split": settings.split,
        "test_images": store.manifest.rows(settings.split),
        "low_data_layer": "the best by all fitting images",
    }


def _write(settings: ProbeConfig, store: TokenStore, report: Report, judged: ProbeResult) -> None:
    about = {"protocol": _protocol(settings, store), "made_by": provenance(settings)}
    storage.write(storage.join(settings.out, "probe.json"), json.dumps({**report, **about}, indent=1).encode())
    classes = store.manifest.classes
    text = io.StringIO()
    rows = ([name, *counts] for name, counts in zip(classes, judged.confusion.tolist(), strict=True))
    csv.writer(text).writerows([["true \\ chosen", *classes], *rows])
    storage.write(storage.join(settings.out, "confusion.csv"), text.getvalue().encode())
    data, linear = io.BytesIO(), judged.linear
    np.savez(
        data,
        mean=linear.mean,
        deviation=linear.deviation,
        weight=linear.weight,
        bias=linear.bias,
        layer=report["best_layer"],
        pooling=settings.pooling,
        precision=settings.precision,
        release=weights.load_config(settings.release).sha256,
        classes=np.array(classes),
    )
    storage.write(storage.join(settings.out, "classifier.npz"), data.getvalue())
