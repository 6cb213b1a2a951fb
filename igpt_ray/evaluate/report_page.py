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
from markupsafe import Markup

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
    environment.filters |= {"accuracies": _accuracies, "mean_and_sd": _mean_and_sd}
    probe = report["probe"]
    return environment.get_template("report.html").render(
        report=report,
        title=_title(report),
        headline=headline(report),
        pictures=dict.fromkeys(("palette", "completions", "most_likely", "least_likely"), ()) | pictures,
        made_by=json.dumps(report["made_by"], indent=1),
        probed={source: probe if source == "network" else probe[source] for source in SOURCES} if probe else {},
        names={"baselines": BASELINES, "classifiers": CLASSIFIERS, "sources": SOURCES, "tuned": TUNED},
        nats_name=nats_name,
        nats_per_bit=math.log(2),
        max_classes=report_plots.MAX_CLASSES,
        plots=_plots(report),
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


def _plots(report: Report) -> dict[str, Markup]:
    plots, likelihood, probe = dict[str, Markup](), report["likelihood"], report["probe"]
    if by_class := likelihood.get("by_class"):
        errors = {name: figures["standard_error"] / math.log(2) for name, figures in by_class.items()}
        dots = [Dot(name, figures["bits_per_pixel"], errors[name]) for name, figures in by_class.items()]
        plots["by_class"] = report_plots.dot_plot(dots)
    if by_position := likelihood.get("by_position"):
        plots["by_position"] = report_plots.surprise_map(np.array(by_position))
    if probe:
        networks = {SOURCES["network"]: probe, SOURCES["untrained"]: probe["untrained"]}
        accuracies = {
            name: {layer["layer"]: layer["validation"] for layer in result["layers"]}
            for name, result in networks.items()
        }
        accuracies[SOURCES["raw_pixels"]] = {0: probe["raw_pixels"]["validation"]}
        plots["by_layer"] = report_plots.line_plot([Line(name, values) for name, values in accuracies.items()])
    return plots


def _accuracies(result: Report) -> list[str]:
    return [f"{result['accuracy']:.1%}", f"{result['top_5']:.1%}", f"{result['ece']:.3f}"]


def _mean_and_sd(runs: Report) -> str:
    return f"{runs['mean']:.1%} ± {runs['sd']:.1%}"
