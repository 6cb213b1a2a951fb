"""Linear probes of every layer on actors: features -> best layer on held-out images -> one test evaluation.

<out>/probe.json         accuracies of the network and of the baselines, and the protocol
<out>/confusion.csv      test images by true class (rows) and predicted class (columns)
<out>/classifier.npz     mean, deviation, weight and bias of the best layer's classifier, and its inputs
"""

import csv
import io
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from igpt_ray import storage, weights
from igpt_ray.data.token_store import TokenStore, tokens_of
from igpt_ray.errors import SettingError
from igpt_ray.evaluate import features, few_shot, linear_probe
from igpt_ray.evaluate.config import FeaturesConfig, FeatureSection, ProbeConfig
from igpt_ray.evaluate.features import Features, FeatureStore, Labels
from igpt_ray.evaluate.linear_probe import Choice, ClassificationReport, Labelled, Method
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.flows.device import assigned_device
from igpt_ray.flows.evaluate import open_store
from igpt_ray.flows.features import extract
from igpt_ray.progress import Progress
from igpt_ray.provenance import provenance
from igpt_ray.settings import Result

NETWORK, UNTRAINED, PIXELS = "network", "untrained", "raw_pixels"


class Choices(Result):
    """What the held-out images select."""

    validation: float
    """Accuracy on them, in [0, 1]."""
    setting: float
    """The penalty, or SGD's learning rate."""


class LayerChoice(Choices):
    layer: int


class Figures(Choices, ClassificationReport):
    """A probe on the test split."""


class Concatenated(Figures):
    layers: list[int]


class SourceFigures(Figures):
    """The best layer of a network, or raw pixels, which have no layers."""

    best_layer: int | None = None
    layers: list[LayerChoice] | None = None
    low_data: dict[str, dict[str, few_shot.Runs]] | None = None
    """Labels per class -> classifier (linear, nearest_neighbour, nearest_centroid) -> accuracies."""


class ProbeReport(SourceFigures):
    release: str
    out: str
    split: str
    untrained: SourceFigures | None = None
    """The network with random weights."""
    raw_pixels: SourceFigures | None = None
    concatenated: Concatenated | None = None


class Task(NamedTuple):
    """Select the setting for the concatenated features of some layers on the held-out images.

    With `choice`: fit with this setting on all fitting images, and evaluate on the test split. With `k`: the test
    accuracy with so many labels per class.
    """

    source: str
    layers: tuple[int, ...]
    choice: Choice | None = None
    k: int | None = None


def probe_layers(settings: ProbeConfig) -> ProbeReport:
    """Probe every layer; report the best layer, and concatenated layers, few labels and baselines if set."""
    store = open_store(settings.release, settings.tokens, settings.fit_split, settings.split)
    check_splits(store, settings)
    roots = _extract(settings)
    layers = [(layer,) for layer in FeatureStore(roots[NETWORK]).spec.layers]
    tasks = [Task(source, layer) for source in roots for layer in layers]
    tasks += [Task(PIXELS, ())] if settings.baselines else []
    choices = _run(tasks, settings, roots)
    best = _best_layers(choices)
    evaluated = list(best.items())
    if settings.concatenate:
        around = _neighbours(best[NETWORK][0], settings.concatenate, [layer for (layer,) in layers])
        choices |= _run([Task(NETWORK, around)], settings, roots)
        evaluated.append((NETWORK, around))
    evaluations = [Task(source, ls, choices[Task(source, ls)]) for source, ls in evaluated]
    few = [Task(source, ls, k=k) for k in settings.low_data for source, ls in best.items()]
    results = _run([*evaluations, *few], settings, roots)
    report = _report(settings, choices, best, results)
    if settings.concatenate:
        last = evaluations[-1]
        report.concatenated = Concatenated(
            layers=list(around), **asdict(choices[Task(NETWORK, around)]), **results[last].report
        )
    _write(settings, store, report, results[evaluations[list(best).index(NETWORK)]])
    return report


def _extract(settings: ProbeConfig) -> dict[str, str]:
    """Compute missing features of both splits: source -> folder."""
    config = FeaturesConfig(
        out=settings.features or storage.join(settings.out, "features"),
        splits=(settings.fit_split, settings.split),
        **{name: getattr(settings, name) for name in FeatureSection.model_fields},
    )
    roots = {NETWORK: extract(config).features}
    if settings.baselines:
        changes = {"out": f"{config.out}-untrained", "untrained": settings.seed}
        roots[UNTRAINED] = extract(config.model_copy(update=changes)).features
    return roots


def _run(tasks: list[Task], settings: ProbeConfig, roots: dict[str, str]) -> dict[Task, Any]:
    results = {}
    arguments = {"settings": settings, "roots": roots}
    progress = Progress("probe", len(tasks), "fits")
    for task, result in zip(tasks, actor_map(tasks, Prober, arguments, settings.pool), strict=True):
        results[task] = result
        chosen = isinstance(result, Choice)
        progress.add(1, f"{task.source} {task.layers}: {result.validation:.1%} held out" if chosen else "")
    return results


def _best_layers(choices: dict[Task, Choice]) -> dict[str, tuple[int, ...]]:
    """Source -> the layer with the highest accuracy on held-out images; ties take the first."""
    best: dict[str, Task] = {}
    for task, choice in choices.items():
        if task.source not in best or choice.validation > choices[best[task.source]].validation:
            best[task.source] = task
    return {source: task.layers for source, task in best.items()}


def _neighbours(best: int, n: int, layers: list[int]) -> tuple[int, ...]:
    """n neighbouring layers, centred on the best unless it is near an end."""
    start = min(max(0, layers.index(best) - n // 2), max(0, len(layers) - n))
    return tuple(layers[start : start + n])


def check_splits(store: TokenStore, settings: ProbeConfig) -> None:
    """Check before the features: splits do not overlap, every image has a label, every class enough for `low_data`."""
    if both := set(settings.fit_split.split("+")) & set(settings.split.split("+")):
        raise SettingError(
            f"the split {both.pop()} is in --fit-split and in --split: the test images must not be fitted on"
        )
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
    """Task -> Choice; ProbeResult with `choice`; accuracies by classifier with `k`."""

    def __init__(self, settings: ProbeConfig, roots: dict[str, str]):
        self.settings = settings
        self.roots = roots
        self.store = TokenStore.open(settings.tokens)
        self.method = Method(settings.method, settings.sgd, settings.seed, assigned_device())

    def __call__(self, task: Task) -> Any:
        classes, seed = self.store.manifest.classes, self.settings.seed
        with tempfile.TemporaryDirectory() as folder:
            fit = self.labelled(task.source, task.layers, self.settings.fit_split, folder)
            if task.choice is None and task.k is None:
                return linear_probe.select(fit, len(classes), seed, self.method)
            test = self.labelled(task.source, task.layers, self.settings.split, folder)
            if task.k is not None:
                return few_shot.few_labels(fit, test, task.k, classes, seed)
            assert task.choice is not None
            linear = linear_probe.refit(fit, len(classes), task.choice.setting, self.method)
            sums = linear_probe.evaluate_classifier(linear, test, np.arange(len(test)), len(classes))
            return ProbeResult(sums.report(), sums.confusion, linear)

    def labelled(self, source: str, layers: tuple[int, ...], split: str, folder: str) -> Labelled:
        """Concatenated features of some layers; for SGD in a file on the local disk, as they may exceed memory."""
        if source == PIXELS:
            return raw_pixels(self.store, split)
        store = FeatureStore(self.roots[source])
        *masks, C = store.spec.shape
        shape = (store.rows(split), *masks, C * len(layers))
        on_disk = self.settings.method == "sgd"
        file = Path(folder, f"{split}.f32")
        x = np.memmap(file, np.float32, "w+", shape=shape) if on_disk else np.empty(shape, np.float32)
        for i, layer in enumerate(layers):
            labels = features.fill(x[..., i * C : (i + 1) * C], store.read(split, layer))
        return Labelled(x, labels)


def raw_pixels(store: TokenStore, split: str) -> Labelled:
    """RGB of the quantised images as features: (N, T * 3) in [0, 1]."""
    palette = store.palette()
    parts = [palette.decode(tokens_of(table)).reshape(table.num_rows, -1) for table in store.read_split(split)]
    pixels: Features = np.concatenate(parts, dtype=np.float32)
    pixels /= 255
    return Labelled(pixels, _labels(store, split))


# ------------------------------------------------------------------------------------------------ the report


def _report(
    settings: ProbeConfig, choices: dict[Task, Choice], best: dict[str, tuple[int, ...]], results: dict[Task, Any]
) -> ProbeReport:
    by_source: dict[str, Any] = {}
    for source, layers in best.items():
        choice = choices[Task(source, layers)]
        figures = {**asdict(choice), **results[Task(source, layers, choice)].report}
        if layers:
            single = [(t.layers[0], c) for t, c in choices.items() if t.source == source and len(t.layers) == 1]
            figures |= {"best_layer": layers[0], "layers": [{"layer": layer, **asdict(c)} for layer, c in single]}
        if settings.low_data:
            few = {str(k): results[Task(source, layers, k=k)] for k in settings.low_data}
            figures["low_data"] = {
                k: {name: few_shot.mean_and_sd(runs) for name, runs in by_name.items()} for k, by_name in few.items()
            }
        by_source[source] = figures
    network = by_source.pop(NETWORK)
    return ProbeReport(release=settings.release, out=settings.out, split=settings.split, **network, **by_source)


def _protocol(settings: ProbeConfig, store: TokenStore) -> dict[str, Any]:
    """The settings that the paper does not state."""
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


def _write(settings: ProbeConfig, store: TokenStore, result: ProbeReport, fitted: ProbeResult) -> None:
    assert result.best_layer is not None
    report = {**result.line(), "protocol": _protocol(settings, store), "made_by": provenance(settings)}
    storage.write(storage.join(settings.out, "probe.json"), json.dumps(report, indent=1).encode())
    classes = store.manifest.classes
    text = io.StringIO()
    rows = ([name, *counts] for name, counts in zip(classes, fitted.confusion.tolist(), strict=True))
    csv.writer(text).writerows([["true \\ chosen", *classes], *rows])
    storage.write(storage.join(settings.out, "confusion.csv"), text.getvalue().encode())
    data = io.BytesIO()
    np.savez(
        data,
        **asdict(fitted.linear),
        layer=result.best_layer,
        pooling=settings.pooling,
        precision=settings.precision,
        release=weights.load_config(settings.release).sha256,
        classes=np.array(classes),
    )
    storage.write(storage.join(settings.out, "classifier.npz"), data.getvalue())
