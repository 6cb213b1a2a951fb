"""The report on a release: plain numbers and pictures -> one HTML page, and a Markdown row.

The page is one file that opens from disk without a network: plots are SVG, pictures are data URIs, and there is no
script. Colours follow the reader's light or dark mode. Names of classes, files and images are untrusted input, so every
string is escaped by `text`.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from igpt_ray.evaluate.report_plots import Dot, Line, Picture, data_uri, dot_plot, line_plot, surprise_map, text

Found = dict[str, Any]


LOSS_FIGURES = {
    "unigram_by_position": "counts: each position by itself",
    "bigram_previous_pixel": "counts: given the pixel before",
    "context_2d": "counts: given the pixels to the left and above",
}
SOURCES = {"network": "this release", "untrained": "the same network untrained", "raw_pixels": "raw pixels"}
TUNED = {"network": "fine-tuned", "scratch": "trained from scratch"}
CLASSIFIERS = {"linear": "probe", "nearest_neighbour": "nearest neighbour", "nearest_centroid": "nearest centroid"}


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
        f'<figure><img src="{data_uri(picture.png)}" alt="{text(picture.caption)}">'
        f"<figcaption>{text(picture.caption)}</figcaption></figure>"
        for picture in pictures
    )
    return f'<div class="figures {size}">{shown}</div>'


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
