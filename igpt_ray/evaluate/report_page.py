"""The report on a release: plain numbers and pictures -> one HTML page, and a Markdown row.

The page is one file that opens from disk without a network: plots are SVG drawn here, pictures are data URIs, and there
is no script. Colours follow the reader's light or dark mode. Names of classes, files and images come from strangers, so
every string goes through `text` before it goes into the page.
"""

import base64
import html
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from igpt_ray.evaluate.likelihood import HEAT

Found = dict[str, Any]


class Picture(NamedTuple):
    png: bytes
    caption: str


class Line(NamedTuple):
    """Accuracy by layer; a single value is drawn right across."""

    name: str
    values: dict[int, float]


class Dot(NamedTuple):
    """A value with its standard error."""

    name: str
    value: float
    error: float


MOST_CLASSES = 30
"""Drawn in the plot of classes: of more, the cheapest and the dearest."""
WIDTH = 360
"""Of every plot, in its own units: about a phone's, so that text keeps its size there."""
LOSS_FIGURES = {
    "unigram_by_position": "counts: each position by itself",
    "bigram_previous_pixel": "counts: given the pixel before",
    "context_2d": "counts: given the pixels to the left and above",
}
SOURCES = {"network": "this release", "untrained": "the same network untrained", "raw_pixels": "raw pixels"}
TUNED = {"network": "fine-tuned", "scratch": "trained from scratch"}
CLASSIFIERS = {"linear": "probe", "nearest_neighbour": "nearest neighbour", "nearest_centroid": "nearest centroid"}


def text(words: object) -> str:
    """Any string, fit for HTML and for an attribute in double quotes."""
    return html.escape(str(words))


# ------------------------------------------------------------------------------------------------ the page


def page(found: Found, pictures: dict[str, list[Picture]]) -> str:
    """The report as HTML. `found` is what report.json says; `pictures` has what belongs into each section."""
    network = found["network"]
    sections = [
        _likelihood(found, pictures),
        _ranked(pictures),
        _probe(found["probe"]) if found["probe"] else "",
        _finetuned(found) if found["finetuned"] else "",
        _completions(pictures),
        _section("Palette", f"<p>{network['n_vocab']} colours.</p>" + _figures(pictures.get("palette", []), "whole")),
        _left_out(found["left_out"]),
        _settings(found),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{text(_title(found))}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{text(_title(found))}</h1>
<p>{text(_objective(network))}, {network["n_params"]:,} parameters, {network["n_px"]} &times; {network["n_px"]} pixels
of {network["n_vocab"]} colours. Figures are of the split <code>{text(found["split"])}</code>.</p>
<p class="place">{text(found["release"])}</p>
</header>
{_cards(found)}
{"".join(sections)}
</body>
</html>
"""


def _title(found: Found) -> str:
    network = found["network"]
    return f"ImageGPT, {network['n_layer']} layers × {network['n_embd']}"


def _objective(network: Found) -> str:
    return "Predicts the next pixel" if network["objective"] == "next" else "Predicts masked pixels"


def _cards(found: Found) -> str:
    """The few figures that are looked for first."""
    cards = [(f"{value}", name) for name, value in headline(found).items()]
    return f'<dl class="cards">{"".join(f"<div><dd>{text(v)}</dd><dt>{text(n)}</dt></div>" for v, n in cards)}</dl>'


def headline(found: Found) -> dict[str, str]:
    """Name -> figure, as the cards and the Markdown row give it."""
    likelihood, probe = found["likelihood"], found["probe"]
    nats = nats_of(likelihood)
    said = {nats.replace("_", " "): f"{likelihood[nats]:.4f} ± {likelihood['standard_error']:.4f}"}
    if "bits_per_pixel" in likelihood:
        said["bits per pixel"] = f"{likelihood['bits_per_pixel']:.3f}"
    if probe:
        said["probe"] = f"{probe['accuracy']:.1%}"
        said["best layer"] = str(probe["best_layer"])
        said |= {SOURCES[s]: f"{probe[s]['accuracy']:.1%}" for s in ("untrained", "raw_pixels")}
        for k, runs in probe.get("low_data", {}).items():
            said[f"probe, {k} labels a class"] = f"{runs['linear']['mean']:.1%} ± {runs['linear']['sd']:.1%}"
    return said | {TUNED[start]: f"{tuned['accuracy']:.1%}" for start, tuned in found["finetuned"].items()}


def row(found: Found) -> str:
    """A Markdown table of one row, for a README."""
    cells = {"release": _title(found), "parameters": f"{found['network']['n_params']:,}", **headline(found)}
    lines = [cells.keys(), ["---"] * len(cells), cells.values()]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


# ------------------------------------------------------------------------------------------------ its sections


def _section(heading: str, *parts: str) -> str:
    return f"<section>\n<h2>{text(heading)}</h2>\n{''.join(parts)}\n</section>\n"


def _likelihood(found: Found, pictures: dict[str, list[Picture]]) -> str:
    said = found["likelihood"]
    if "bits_per_pixel" not in said:
        told = f"<p>Mean over {said['images']:,} images under {said['masks']} masks of each; this is no likelihood.</p>"
        return _section("Masked pixels", told)
    rows = [["this release", said["nats_per_token"], said["bits_per_pixel"]]]
    for name, nats in said.get("baselines", {}).items():
        rows.append([LOSS_FIGURES[name], nats, nats / math.log(2)])
    told = f"""<p>{said["images"]:,} images, {said["tokens"]:,} tokens; ± is the standard error over images. Bits are of
the {found["network"]["n_vocab"]}-colour picture and cannot be compared with bits per dimension of 256 levels.</p>"""
    body = [[text(name), f"{nats:.4f}", f"{bits:.3f}"] for name, nats, bits in rows]
    parts = [told, table(["", "nats per token", "bits per pixel"], body)]
    if by_class := said.get("by_class"):
        ln2 = math.log(2)
        dots = [Dot(n, r["bits_per_pixel"], r["standard_error"] / ln2) for n, r in by_class.items()]
        parts += ["<h3>Bits per pixel by class</h3>", dot_plot(dots)]
    if by_position := said.get("by_position"):
        parts += ["<h3>Where the surprise is</h3>", surprise_map(pictures["surprise"][0], by_position)]
    return _section("Likelihood", *parts)


def _ranked(pictures: dict[str, list[Picture]]) -> str:
    ends = [("most_likely", "Most likely"), ("least_likely", "Least likely")]
    parts = [f"<h3>{heading}</h3>{_figures(pictures[end], 'small')}" for end, heading in ends if pictures.get(end)]
    return _section("Images by nats per token", *parts) if parts else ""


def _probe(probe: Found) -> str:
    sources = {"network": probe, "untrained": probe["untrained"], "raw_pixels": probe["raw_pixels"]}
    protocol = probe["protocol"]
    told = f"""<p>Fitted on {protocol["fit_images"]:,} images of <code>{text(protocol["fit_split"])}</code>, of which
{protocol["held_out_images"]:,} were held out to choose penalty and layer; what was chosen saw the
{protocol["test_images"]:,} images of <code>{text(protocol["test_split"])}</code> once. ECE is the expected calibration
error.</p>"""
    lines = [
        Line(SOURCES[source], {tried["layer"]: tried["validation"] for tried in said["layers"]})
        for source, said in sources.items()
        if "layers" in said
    ]
    lines.append(Line(SOURCES["raw_pixels"], {0: probe["raw_pixels"]["validation"]}))
    body = [
        [text(SOURCES[source]), str(said.get("best_layer", "")), *_shares(said), f"{said['ece']:.3f}"]
        for source, said in sources.items()
    ]
    header = ["", "layer", "accuracy", "top 5", "ECE"]
    parts = [told, "<h3>Accuracy on held-out images, by layer</h3>", line_plot(lines), table(header, body)]
    if probe.get("low_data"):
        parts += ["<h3>Few labels</h3>", _low_data(sources)]
    return _section("Linear probe", *parts)


def _finetuned(found: Found) -> str:
    """All of the network with a class head, beside what needs less training."""
    tuned, probe = found["finetuned"], found["probe"]
    told = """<p>All of the network, with a head for the classes, trained on the classes and on the pixels together,
until its accuracy on images that were held out no longer grew. From scratch is the same, begun with random weights.
Nats are of the pictures, after that.</p>"""
    body = [
        [text(TUNED[start]), *_shares(said), f"{said['ece']:.3f}", _nats(said), str(said["best_step"])]
        for start, said in tuned.items()
    ]
    for source in SOURCES:
        said = probe if source == "network" else probe[source]
        body.append([text(f"linear probe, {SOURCES[source]}"), *_shares(said), f"{said['ece']:.3f}", "", ""])
    return _section("Fine-tuning", told, table(["", "accuracy", "top 5", "ECE", "nats per token", "step"], body))


def _nats(said: Found) -> str:
    return f"{said[nats_of(said)]:.4f}"


def nats_of(likelihood: Found) -> str:
    """Which nats a network has: those of a masked one are no likelihood."""
    return "nats_per_token" if "nats_per_token" in likelihood else "nats_per_masked_token"


def _shares(said: Found) -> list[str]:
    return [f"{said[share]:.1%}" for share in ("accuracy", "top_5")]


def _low_data(sources: dict[str, Found]) -> str:
    ks = list(sources["network"]["low_data"])
    body = [
        [text(f"{SOURCES[source]}, {CLASSIFIERS[name]}")]
        + [f"{runs['mean']:.1%} ± {runs['sd']:.1%}" for runs in (said["low_data"][k][name] for k in ks)]
        for source, said in sources.items()
        for name in CLASSIFIERS
    ]
    told = "<p>Test accuracy, mean and standard deviation over five subsets, at the layer that all labels choose.</p>"
    return told + table(["", *(f"{k} a class" for k in ks)], body)


def _completions(pictures: dict[str, list[Picture]]) -> str:
    if not pictures.get("completions"):
        return ""
    return _section("Completions", _figures(pictures["completions"], "whole"))


def _left_out(reasons: Sequence[str]) -> str:
    if not reasons:
        return ""
    return _section("Left out", f"<ul>{''.join(f'<li>{text(reason)}</li>' for reason in reasons)}</ul>")


def _settings(found: Found) -> str:
    said = text(json.dumps(found["made_by"], indent=1))
    return _section("Settings", f"<details><summary>Settings, versions, revision</summary><pre>{said}</pre></details>")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figures(pictures: list[Picture], size: str) -> str:
    shown = "".join(
        f'<figure><img src="{_data_uri(picture.png)}" alt="{text(picture.caption)}">'
        f"<figcaption>{text(picture.caption)}</figcaption></figure>"
        for picture in pictures
    )
    return f'<div class="figures {size}">{shown}</div>'


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


# ------------------------------------------------------------------------------------------------ plots


def line_plot(lines: list[Line]) -> str:
    """Accuracy in [0, 1] by layer. Lines differ in colour and in dashes, and are named below in their order."""
    layers = sorted({layer for line in lines for layer in line.values})
    low, high = ticks([value for line in lines for value in line.values.values()])
    left, right, top, bottom = 40, WIDTH - 10, 10, 180

    def x(layer: float) -> float:
        return left + (right - left) * (layer - layers[0]) / max(1, layers[-1] - layers[0])

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    drawn = []
    for i in range(5):
        value = low + (high - low) * i / 4
        drawn.append(f'<path class="grid" d="M{left} {y(value):.1f}H{right}"/>')
        drawn.append(f'<text x="{left - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0%}</text>')
    every = -(-len(layers) // 12)
    drawn += [f'<text x="{x(n):.1f}" y="{bottom + 16}" text-anchor="middle">{n}</text>' for n in layers[::every]]
    drawn.append(f'<text x="{(left + right) / 2}" y="{bottom + 32}" text-anchor="middle">layer</text>')
    for i, line in enumerate(lines):
        points = sorted(line.values.items())
        if len(points) == 1:
            points = [(layers[0], points[0][1]), (layers[-1], points[0][1])]
        else:
            drawn += [f'<circle class="fill{i}" cx="{x(n):.1f}" cy="{y(v):.1f}" r="3"/>' for n, v in points]
        path = "L".join(f"{x(n):.1f} {y(v):.1f}" for n, v in points)
        drawn.append(f'<path class="line line{i}" d="M{path}"/>')
    keys = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><path class="line line{i}" d="M0 4H24"/></svg>'
        f"{text(line.name)}</li>"
        for i, line in enumerate(lines)
    )
    return f'{_svg("accuracy by layer", bottom + 40, drawn)}<ul class="keys">{keys}</ul>'


def dot_plot(dots: list[Dot]) -> str:
    """A dot a class with two standard errors to either side, the cheapest first."""
    dots = sorted(dots, key=lambda dot: dot.value)
    if len(dots) > MOST_CLASSES:
        half = MOST_CLASSES // 2
        note = f"<p>The {half} cheapest and the {half} dearest of {len(dots)} classes.</p>"
        dots = dots[:half] + dots[-half:]
    else:
        note = ""
    low, high = ticks([dot.value + side * 2 * dot.error for dot in dots for side in (-1, 1)])
    left, right, line = 110, WIDTH - 16, 18
    bottom = 6 + line * len(dots)

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    drawn = []
    for i in range(5):
        value = low + (high - low) * i / 4
        drawn.append(f'<path class="grid" d="M{x(value):.1f} 0V{bottom}"/>')
        drawn.append(
            f'<text x="{x(value):.1f}" y="{bottom + 15}" text-anchor="middle">{value:.{digits(high - low)}f}</text>'
        )
    for i, dot in enumerate(dots):
        y = 6 + line * i + line / 2
        ends = [min(max(x(dot.value + side * 2 * dot.error), left), right) for side in (-1, 1)]
        name = dot.name if len(dot.name) <= 16 else f"{dot.name[:15]}…"
        drawn.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{text(name)}</text>')
        drawn.append(f'<path class="line line0" d="M{ends[0]:.1f} {y:.1f}H{ends[1]:.1f}"/>')
        said = f"{dot.name}: {dot.value:.3f} ± {dot.error:.3f}"
        drawn.append(
            f'<circle class="fill0" cx="{x(dot.value):.1f}" cy="{y:.1f}" r="4"><title>{text(said)}</title></circle>'
        )
    return note + _svg("bits per pixel by class", bottom + 22, drawn) + "<p>Whiskers are two standard errors.</p>"


def surprise_map(picture: Picture, by_position: list[list[float]]) -> str:
    """The heat map over the grid of pixels, with rows, columns and the scale of its colours."""
    n_px, most = len(by_position), max(map(max, by_position))
    side, left, top = 240, 30, 18
    drawn = [
        f'<image href="{_data_uri(picture.png)}" x="{left}" y="{top}" width="{side}" height="{side}"/>',
        f'<defs><linearGradient id="heat" x1="0" y1="1" x2="0" y2="0">{_stops()}</linearGradient></defs>',
        f'<rect x="{left + side + 16}" y="{top}" width="14" height="{side}" fill="url(#heat)"/>',
    ]
    for share in (0, 0.5, 1):
        y = top + side * (1 - share)
        drawn.append(f'<text x="{left + side + 36}" y="{y + 4:.1f}">{most * share:.2f}</text>')
    cell = side / n_px
    for i in sorted({0, n_px // 2, n_px - 1}):
        middle = (i + 0.5) * cell
        drawn.append(f'<text x="{left + middle:.1f}" y="{top - 5}" text-anchor="middle">{i}</text>')
        drawn.append(f'<text x="{left - 5}" y="{top + middle + 4:.1f}" text-anchor="end">{i}</text>')
    return _svg(picture.caption, top + side + 10, drawn) + f"<p>{text(picture.caption)}</p>"


def _stops() -> str:
    last = len(HEAT) - 1
    return "".join(f'<stop offset="{i / last:.3f}" stop-color="rgb{colour}"/>' for i, colour in enumerate(HEAT))


def ticks(values: list[float]) -> tuple[float, float]:
    """Round ends of an axis that holds all values, a multiple of four steps of 1, 2 or 5 apart."""
    low, high = min(values), max(values)
    rough = max(high - low, 1e-9, abs(high) * 1e-6) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        start = math.floor(low / step + 1e-9) * step
        if start + 4 * step >= high - 1e-12:
            return start, start + 4 * step
    raise AssertionError(f"no axis holds {low} to {high}")


def digits(width: float) -> int:
    """Decimals that tell the ticks of an axis apart."""
    return max(0, math.ceil(-math.log10(width / 4) - 1e-9))


def _svg(name: str, height: float, drawn: list[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:.0f}"'
    return f'<svg class="plot" {box} role="img" aria-label="{text(name)}">{"".join(drawn)}</svg>'


STYLE = """
:root { --paper: #fdfcf9; --ink: #1f2328; --faint: #6a6f76; --rule: #dfddd6;
  --one: #1f6feb; --two: #c2410c; --three: #15803d; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161a; --ink: #e6e4df; --faint: #9a9fa7; --rule: #32363d;
    --one: #6cb0ff; --two: #ff9a5c; --three: #5fd38a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem; border-bottom: 1px solid var(--rule); }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
p { margin: .5rem 0; }
.place, figcaption, .keys, section > p { color: var(--faint); font-size: .875rem; }
.place, figcaption { overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .5rem; }
.cards div { border: 1px solid var(--rule); border-radius: .5rem; padding: .5rem .75rem;
  display: flex; flex-direction: column; }
.cards dd { margin: 0; font-size: 1rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.cards dt { color: var(--faint); font-size: .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 6.5rem; }
th { font-weight: 600; color: var(--faint); white-space: normal; vertical-align: bottom; }
@media (max-width: 30rem) { table { font-size: .8rem; } th, td { padding: .3rem .35rem; } }
.plot { display: block; width: 100%; max-width: 34rem; height: auto; margin: .5rem 0; }
.plot text { font: 11px system-ui, sans-serif; fill: var(--faint); }
.plot image { image-rendering: pixelated; }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.line { fill: none; stroke-width: 2; }
.line0 { stroke: var(--one); } .line1 { stroke: var(--two); stroke-dasharray: 5 3; }
.line2 { stroke: var(--three); stroke-dasharray: 1 3; stroke-linecap: round; }
.fill0 { fill: var(--one); } .fill1 { fill: var(--two); } .fill2 { fill: var(--three); }
.keys { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: .25rem 0 1rem; }
.keys svg { width: 24px; height: 8px; margin-right: .4rem; }
.figures { display: grid; gap: .75rem; }
.figures.small { grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 2px; }
.whole img { max-width: 46rem; }
figcaption { font-size: .75rem; line-height: 1.3; margin-top: .2rem; }
pre { overflow-x: auto; font-size: .8rem; }
"""
