"""The plots of a report: matplotlib figures as inline SVG, coloured by the CSS variables of the page."""

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup

from igpt_ray.errors import SettingError
from igpt_ray.evaluate.likelihood import HEAT_COLOURS, Nats

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Line(NamedTuple):
    """Accuracy by layer; a single value is drawn as a horizontal line."""

    name: str
    values: dict[int, float]


class Dot(NamedTuple):
    """A value with its standard error."""

    name: str
    value: float
    error: float


MAX_CLASSES = 30
"""Maximum number of classes in the dot plot; of more, only the lowest and the highest are drawn."""
MAX_NAME = 20
"""Maximum number of characters of a class name in the dot plot; a longer name is cut."""
WIDTH = 5.0
"""Width of every plot in inches of 72 SVG units: 360 units, the width of a phone, so that text keeps its size."""
COLOURS = {"#000001": "one", "#000002": "two", "#000003": "three", "#000004": "faint", "#000005": "rule"}
"""Placeholder colour -> CSS variable: matplotlib writes fixed colours, and the page has a light and a dark mode."""
ONE, TWO, THREE, FAINT, RULE = COLOURS
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # equal reports are equal byte by byte
    "text.parse_math": False,  # a class name may contain $
    "font.sans-serif": "DejaVu Sans",
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), FAINT),
    **dict.fromkeys((f"axes.spines.{side}" for side in ("left", "right", "top", "bottom")), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "grid.color": RULE,
}


def check_installed() -> None:
    """Raise `SettingError` if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingError("the report needs matplotlib: pip install 'igpt_ray[report]'") from error


def line_plot(lines: list[Line]) -> Markup:
    """Accuracy in [0, 1] by layer. Lines differ in colour and in dashes."""
    layers = sorted({layer for line in lines for layer in line.values})

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import PercentFormatter

        for line, colour, dashes in zip(lines, (ONE, TWO, THREE), ("-", "--", ":"), strict=False):
            style: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": 2, "label": line.name}
            if len(line.values) == 1:
                axes.plot((layers[0], layers[-1]), [*line.values.values()] * 2, **style)
            else:
                axes.plot(list(line.values), list(line.values.values()), marker="o", markersize=5, **style)
        axes.set_xlabel("layer")
        axes.set_xticks(layers[:: -(-len(layers) // 12)])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.figure.legend(loc="outside lower center", frameon=False, ncols=2)

    return _svg("accuracy by layer", 3.0, draw)


def dot_plot(dots: list[Dot]) -> Markup:
    """One dot per class with two standard errors to either side, the lowest value first."""
    dots = sorted(dots, key=lambda dot: dot.value)
    if len(dots) > MAX_CLASSES:
        dots = dots[: MAX_CLASSES // 2] + dots[-MAX_CLASSES // 2 :]

    def draw(axes: "Axes") -> None:
        rows, values, errors = range(len(dots)), [dot.value for dot in dots], [2 * dot.error for dot in dots]
        axes.errorbar(values, rows, xerr=errors, fmt="o", color=ONE, markersize=6, linewidth=2)
        names = (dot.name if len(dot.name) <= MAX_NAME else f"{dot.name[: MAX_NAME - 1]}…" for dot in dots)
        axes.set_yticks(rows, list(names))
        axes.set_ylim(len(dots) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")

    return _svg("bits per pixel by class", 0.4 + 0.25 * len(dots), draw)


def surprise_map(by_position: Nats) -> Markup:
    """Nats at each pixel, (n_px, n_px), with rows, columns and the scale of the colours."""

    def draw(axes: "Axes") -> None:
        from matplotlib.colors import LinearSegmentedColormap

        colours = LinearSegmentedColormap.from_list("heat", np.array(HEAT_COLOURS) / 255)
        image = axes.imshow(by_position, colours, vmin=0, interpolation="none")
        last = len(by_position) - 1
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(sorted({0, len(by_position) // 2, last}))
        axes.grid(visible=False)
        axes.figure.colorbar(image, ax=axes).outline.set_visible(False)

    return _svg("nats per token by position", 3.8, draw)


def _svg(label: str, height: float, draw: Callable[["Axes"], None]) -> Markup:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The reader's browser has fonts that this machine lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure, file = Figure(figsize=(WIDTH, height), layout="constrained"), io.StringIO()
        draw(figure.subplots())
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue().partition("<svg ")[2]
    for placeholder, variable in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    return Markup(f'<svg class="plot" role="img" aria-label="{label}" {svg}')
