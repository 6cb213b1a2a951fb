"""The report on a release: plain numbers and pictures -> one HTML page (report.html), and a Markdown row.

The page is one file that opens from disk without a network: plots are SVG, pictures are data URIs, and there is no
script. Names of classes, files and images are untrusted input; the template escapes every string.
"""

import base64
import json
import math
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from igpt_ray.evaluate import report_plots
from igpt_ray.evaluate.report_plots import Dot, Line

Report = dict[str, Any]
"""The content of report.json, or a part of it."""

BASELINES = {
    "unigram_by_position": "counts: each position by itself",
    "bigram_previous_pixel": "counts: given the previous pixel",
    "context_2d": "counts: given the pixels to the left and above",
}
SOURCES = {"network": "this release", "untrained": "the same network untrained", "raw_pixels": "raw pixels"}
TUNED = {"network": "fine-tuned", "scratch": "trained from scratch"}
CLASSIFIERS = {"linear": "probe", "nearest_neighbour": "nearest neighbour", "nearest_centroid": "nearest centroid"}


class Picture(NamedTuple):
    png: bytes
    caption: str

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


def page(report: Report, pictures: dict[str, list[Picture]]) -> str:
    """Render the report as HTML. `pictures` maps palette, completions, most_likely and least_likely to pictures.

    Raises `SettingError` if matplotlib is missing.
    """
    environment = Environment(
        loader=PackageLoader("igpt_ray", "evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    likelihood, probe = report["likelihood"], report["probe"]
    values: dict[str, Any] = {
        "report": report,
        "title": _title(report),
        "headline": headline(report),
        "pictures": dict.fromkeys(("palette", "completions", "most_likely", "least_likely"), ()) | pictures,
        "made_by": json.dumps(report["made_by"], indent=1),
    }
    return environment.get_template("report.html").render(
        **values, **_likelihood(likelihood), **(_probe(probe) if probe else {}), **_finetuned(report)
    )


def _title(report: Report) -> str:
    network = report["network"]
    return f"ImageGPT, {network['n_layer']} layers × {network['n_embd']}"


def headline(report: Report) -> dict[str, str]:
    """Name -> figure, as in the cards of the page and in the Markdown row."""
    likelihood, probe = report["likelihood"], report["probe"]
    nats = nats_name(likelihood)
    figures = {nats.replace("_", " "): f"{likelihood[nats]:.4f} ± {likelihood['standard_error']:.4f}"}
    if "bits_per_pixel" in likelihood:
        figures["bits per pixel"] = f"{likelihood['bits_per_pixel']:.3f}"
    if probe:
        figures["probe"] = f"{probe['accuracy']:.1%}"
        figures["best layer"] = str(probe["best_layer"])
        figures |= {SOURCES[s]: f"{probe[s]['accuracy']:.1%}" for s in ("untrained", "raw_pixels")}
        for k, runs in probe.get("low_data", {}).items():
            figures[f"probe, {k} labels a class"] = _mean_and_sd(runs["linear"])
    return figures | {TUNED[start]: f"{tuned['accuracy']:.1%}" for start, tuned in report["finetuned"].items()}


def row(report: Report) -> str:
    """A Markdown table of one row, for a README."""
    cells = {"release": _title(report), "parameters": f"{report['network']['n_params']:,}", **headline(report)}
    lines = [cells.keys(), ["---"] * len(cells), cells.values()]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def nats_name(likelihood: Report) -> str:
    """The name of the nats that a network reports: those of a masked network are not a likelihood."""
    return "nats_per_token" if "nats_per_token" in likelihood else "nats_per_masked_token"


# ------------------------------------------------------------------------------------------------ values of sections


def _likelihood(likelihood: Report) -> Report:
    if "bits_per_pixel" not in likelihood:
        return {}
    rows = {"this release": likelihood["nats_per_token"]}
    rows |= {BASELINES[name]: nats for name, nats in likelihood.get("baselines", {}).items()}
    by_class, by_position = likelihood.get("by_class"), likelihood.get("by_position")
    dots = [
        Dot(name, figures["bits_per_pixel"], figures["standard_error"] / math.log(2))
        for name, figures in (by_class or {}).items()
    ]
    return {
        "nats_rows": [[name, f"{nats:.4f}", f"{nats / math.log(2):.3f}"] for name, nats in rows.items()],
        "class_plot": report_plots.dot_plot(dots) if dots else "",
        "max_classes": report_plots.MAX_CLASSES,
        "position_plot": report_plots.surprise_map(np.array(by_position)) if by_position else "",
    }


def _probe(probe: Report) -> Report:
    sources = _sources(probe)
    lines = [
        Line(SOURCES[source], {layer["layer"]: layer["validation"] for layer in result["layers"]})
        for source, result in sources.items()
        if "layers" in result
    ]
    lines.append(Line(SOURCES["raw_pixels"], {0: probe["raw_pixels"]["validation"]}))
    ks = list(probe.get("low_data", {}))
    return {
        "layer_plot": report_plots.line_plot(lines),
        "probe_rows": [
            [SOURCES[source], str(result.get("best_layer", "")), *_accuracies(result)]
            for source, result in sources.items()
        ],
        "low_data_header": ["", *(f"{k} a class" for k in ks)],
        "low_data_rows": [
            [f"{SOURCES[source]}, {CLASSIFIERS[name]}", *(_mean_and_sd(result["low_data"][k][name]) for k in ks)]
            for source, result in sources.items()
            for name in CLASSIFIERS
            if ks
        ],
    }


def _finetuned(report: Report) -> Report:
    """The fine-tuned networks above the linear probes, which need less training."""
    rows = [
        [TUNED[start], *_accuracies(tuned), f"{tuned[nats_name(tuned)]:.4f}", str(tuned["best_step"])]
        for start, tuned in report["finetuned"].items()
    ]
    if rows:
        probes = _sources(report["probe"])
        rows += [[f"linear probe, {SOURCES[s]}", *_accuracies(result), "", ""] for s, result in probes.items()]
    return {"finetuned_rows": rows}


def _sources(probe: Report) -> dict[str, Report]:
    """Source of the features -> its result."""
    return {source: probe if source == "network" else probe[source] for source in SOURCES}


def _accuracies(result: Report) -> list[str]:
    return [f"{result['accuracy']:.1%}", f"{result['top_5']:.1%}", f"{result['ece']:.3f}"]


def _mean_and_sd(runs: Report) -> str:
    return f"{runs['mean']:.1%} ± {runs['sd']:.1%}"
