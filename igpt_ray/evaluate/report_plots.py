"""The plots of the report, as SVG strings that scale with the page.

Every string from outside goes through `text` before it goes into a plot.
"""

import base64
import html
import math
from typing import NamedTuple

from igpt_ray.evaluate.likelihood import HEAT


class Picture(NamedTuple):
    png: bytes
    caption: str


class Line(NamedTuple):
    """Accuracy by layer; a single value is drawn as a horizontal line."""

    name: str
    values: dict[int, float]


class Dot(NamedTuple):
    """A value with its standard error."""

    name: str
    value: float
    error: float


MOST_CLASSES = 30
"""Maximum number of classes in the dot plot: of more, only the lowest and the highest are drawn."""
WIDTH = 360
"""Width of every plot in SVG units: about the width of a phone, so that text keeps its size there."""


def text(words: object) -> str:
    """Escape a string for HTML text and for an attribute in double quotes."""
    return html.escape(str(words))


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


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
        f'<image href="{data_uri(picture.png)}" x="{left}" y="{top}" width="{side}" height="{side}"/>',
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
    """Number of decimals that makes the five tick labels of an axis differ."""
    return max(0, math.ceil(-math.log10(width / 4) - 1e-9))


def _svg(name: str, height: float, drawn: list[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:.0f}"'
    return f'<svg class="plot" {box} role="img" aria-label="{text(name)}">{"".join(drawn)}</svg>'
