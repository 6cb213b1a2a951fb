"""The report page: correct figures and plots, one self-contained file, and every string escaped."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from igpt_ray.data import pixels as images
from igpt_ray.errors import SettingError
from igpt_ray.evaluate import report_page, report_plots
from igpt_ray.evaluate.report_page import Picture
from igpt_ray.evaluate.report_plots import Dot, Line

HOSTILE = '<script>$x$</script>"|'
SVG = "{http://www.w3.org/2000/svg}"
VARIABLES = ("one", "two", "three", "faint", "rule")
PICTURE = Picture(images.png(np.zeros((2, 2, 3), np.uint8)), f"1.234 {HOSTILE}")
PICTURES = {name: [PICTURE] for name in ("completions", "palette", "most_likely", "least_likely")}


def runs(mean: float) -> dict[str, Any]:
    return {name: {"mean": mean, "sd": 0.01, "runs": [mean] * 5} for name in report_page.CLASSIFIERS}


def probed(validation: list[float]) -> dict[str, Any]:
    layers = [{"layer": layer, "validation": v, "setting": 1e-3} for layer, v in enumerate(validation)]
    test = {
        "accuracy": 0.625,
        "top_5": 0.875,
        "nats": 1.0,
        "ece": 0.031,
        "best_layer": 1,
        "validation": max(validation),
    }
    return {**test, "layers": layers, "low_data": {"4": runs(0.25)}}


def report(**change: Any) -> dict[str, Any]:
    """A report in which every string from outside is hostile."""
    nats = {"nats_per_token": 1.5, "standard_error": 0.02, "bits_per_pixel": 2.164, "images": 40, "tokens": 160}
    pixels = {name: value for name, value in probed([0.9]).items() if name not in ("layers", "best_layer")}
    tuned = {"accuracy": 0.75, "top_5": 1.0, "ece": 0.02, "best_step": 300}
    protocol = {
        "fit_images": 120,
        "fit_split": HOSTILE,
        "held_out_images": 24,
        "test_images": 40,
        "test_split": HOSTILE,
    }
    return {
        "release": HOSTILE,
        "split": HOSTILE,
        "network": {"n_layer": 2, "n_embd": 8, "n_px": 2, "n_vocab": 16, "objective": "next", "n_params": 1234},
        "likelihood": {
            **nats,
            "baselines": {"unigram_by_position": 2.0},
            "by_class": {HOSTILE: nats, "dog": nats | {"bits_per_pixel": 3.0}},
            "by_position": [[1.0, 2.0], [0.5, 0.25]],
        },
        "probe": {
            **probed([0.4, 0.6, 0.5]),
            "untrained": probed([0.2] * 3),
            "raw_pixels": pixels,
            "protocol": protocol,
        },
        "finetuned": {start: {**nats, **tuned} for start in report_page.TUNED},
        "left_out": [HOSTILE],
        "made_by": {"settings": HOSTILE},
        **change,
    }


class Names(HTMLParser):
    """Parser that collects tags, and attributes that load a resource."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.fetched: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert not [name for name, _ in attrs if name.startswith("on")]


def test_a_class_named_script_is_text() -> None:
    """Names of classes, files and URIs are untrusted input."""
    page = report_page.page(report(), PICTURES)
    assert "script" not in Names(page).tags
    assert page.count("&lt;script&gt;") >= 8
    assert "<script" not in page


def test_the_page_needs_no_network() -> None:
    fetched = Names(report_page.page(report(), PICTURES)).fetched
    pictures = [uri for uri in fetched if not uri.startswith("#")]
    assert len(pictures) >= len(PICTURES)
    assert all(uri.startswith("data:image/png;base64,") for uri in pictures)


def test_equal_reports_give_equal_pages() -> None:
    assert report_page.page(report(), PICTURES) == report_page.page(report(), PICTURES)


def test_every_plot_is_well_formed_svg_inside_its_box() -> None:
    """The browser cuts off labels and markers outside the box without a warning."""
    plots = re.findall(r'<svg class="plot".*?</svg>', report_page.page(report(), PICTURES), re.DOTALL)
    assert len(plots) == 3
    for plot in plots:
        svg = ElementTree.fromstring(plot)
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        placed = [*svg.iter(f"{SVG}text"), *svg.iter(f"{SVG}use")]
        assert placed
        for element in placed:
            assert 0 <= float(element.attrib["x"]) <= width
            assert 0 <= float(element.attrib["y"]) <= height


def test_plots_take_their_colours_from_the_page() -> None:
    """A fixed colour would be invisible in the light or in the dark mode."""
    lines, dots = [Line("a", {0: 0.4, 1: 0.5})], [Dot("a", 1.0, 0.1)]
    surprise = report_plots.surprise_map(np.ones((2, 2)))
    for plot in (report_plots.line_plot(lines), report_plots.dot_plot(dots), surprise):
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", plot)) <= {"none", *map("var(--{})".format, VARIABLES)}


def test_markers_are_at_their_values() -> None:
    """0.6 must be above 0.4, with 0.5 half-way between them."""
    plot = report_plots.line_plot([Line("a", {0: 0.4, 1: 0.5, 2: 0.6})])
    x, y = zip(*_markers(plot)[:3], strict=True)
    assert y[0] > y[1] > y[2]
    assert y[1] == pytest.approx((y[0] + y[2]) / 2, abs=0.1)
    assert x[1] == pytest.approx((x[0] + x[2]) / 2, abs=0.1)


def _markers(plot: str) -> list[tuple[float, float]]:
    return [(float(use.attrib["x"]), float(use.attrib["y"])) for use in ElementTree.fromstring(plot).iter(f"{SVG}use")]


@pytest.mark.parametrize(
    "values", [[0.0, 1.0], [0.31, 0.33], [2.9999, 3.0001], [5.0, 5.0], [-0.4, 0.1], [0.0], [1e-5, 3e-5]]
)
def test_tick_labels_differ(values: list[float]) -> None:
    """Rounded labels of a narrow axis would all be the same number."""
    plot = report_plots.dot_plot([Dot("", value, 0.0) for value in values])
    labels = [text.text for text in ElementTree.fromstring(plot).iter(f"{SVG}text") if text.text]
    assert len(labels) == len(set(labels)) >= 3


def test_a_plot_of_a_thousand_classes_shows_both_ends() -> None:
    plot = report_plots.dot_plot([Dot(f"class {i}", i / 1000, 0.0) for i in range(1000)])
    assert len(_markers(plot)) == report_plots.MAX_CLASSES
    assert ">class 0<" in plot
    assert ">class 999<" in plot


def test_a_class_name_in_any_script_needs_no_font_here(recwarn: pytest.WarningsRecorder) -> None:
    assert ">猫<" in report_plots.dot_plot([Dot("猫", 1.0, 0.0)])
    assert not recwarn.list


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingError, match=r"pip install 'igpt_ray\[report\]'"):
        report_plots.check_installed()


def test_the_page_of_a_masked_network_has_no_likelihood_and_no_completions() -> None:
    masked = {"nats_per_masked_token": 1.2, "standard_error": 0.1, "masks": 5, "images": 40}
    network = {**report()["network"], "objective": "masked"}
    page = report_page.page(
        report(likelihood=masked, network=network, probe=None, finetuned={}), {"palette": [PICTURE]}
    )
    assert "1.2000 ± 0.1000" in page
    assert "Completions" not in page
    assert "Linear probe" not in page


def test_the_markdown_row_has_a_cell_for_every_heading() -> None:
    """An unescaped bar would add a column."""
    lines = report_page.row(report(network={**report()["network"], "n_layer": "2|3"})).splitlines()
    assert len(lines) == 3
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "1.5000 ± 0.0200" in lines[2]
    assert "62.5%" in lines[2]
