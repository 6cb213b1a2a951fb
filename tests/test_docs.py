"""Every command that the documentation shows names a job that exists, with settings that parse."""

import importlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from conftest import random_model

from igpt_ray import cli, weights
from igpt_ray.data.palette import Palette
from igpt_ray.data.pixels import png
from igpt_ray.data.token_store import TokenFormat
from igpt_ray.flows.config import DemoConfig

ROOT = Path(__file__).resolve().parent.parent
MAKE_TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


JOB = re.compile(r"(?:\bpython (?:jobs/|-m benchmarks )|^igpt (?=[a-z]+ )).*")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
RENDER = re.compile(r"\bpython cluster/render\.py (\S+) (\S+)")


def commands() -> list[tuple[str, list[str]]]:
    """(where it stands, words) of each command in the README, docs/, cluster/ and infra/.

    A command is `make ...`, `igpt ...` or `python jobs/...`: alone, behind `ray job submit ... --`, or inside a line.
    """
    texts = [(p.name, block) for p in PAGES for block in re.findall(r"```bash\n(.*?)```", p.read_text(), re.DOTALL)]
    beside = [p for place in ("cluster", "infra") for p in sorted(ROOT.glob(f"{place}/**/*")) if p.is_file()]
    texts += [(path.name, path.read_text()) for path in beside if "__pycache__" not in path.parts]
    found = []
    for where, text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("make "):
                found.append((where, shlex.split(line, comments=True)))
            elif job := JOB.search(line):
                words = job[0].split("`")[0].split(" > ")[0].split(" | ")[0]
                found.append((where, shlex.split(words, comments=True)))
    return found


def test_the_documentation_has_commands() -> None:
    assert {where for where, _ in commands()} >= {"README.md", "aws.yaml", "gcp.yaml", "render.py", "rayjob.yaml"}
    shown = {Path(words[1]).stem for where, words in commands() if where == "commands.md"}
    assert shown >= {path.stem for path in ROOT.glob("jobs/*.py")}


def test_what_the_readme_renders_is_there() -> None:
    text = "".join(page.read_text() for page in PAGES) + "".join(p.read_text() for p in ROOT.glob("cluster/**/*.*"))
    shown = RENDER.findall(text)
    assert len(shown) > 5
    for source, target in shown:
        assert (ROOT / source).exists(), source
        assert target.startswith("build/")


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x[:2]))
def test_a_documented_command_parses(where: str, words: list[str]) -> None:
    if words[0] == "make":
        assert words[1] in MAKE_TARGETS
        return
    if words[1] == "-m":  # `python -m benchmarks palette` reads benchmarks.palette.BenchPaletteConfig
        module = importlib.import_module(f"benchmarks.{words[3]}")
        tyro.cli(getattr(module, f"Bench{words[3].title()}Config"), args=words[4:])
        return
    name = words[1] if words[0] == "igpt" else Path(words[1]).stem
    if name == "demo":
        tyro.cli(DemoConfig, args=words[2:])
    else:
        cli.parse(name, words[2:], name)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub forms them; `#` lines inside fenced blocks are not headings."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link, _, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(#([^)]+))?\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}#{anchor}"


def test_the_readme_links_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in ROOT.glob("docs/*.md") if f"](docs/{page.name})" not in text] == []


def test_the_glossary_is_short() -> None:
    terms = re.findall(r"^\* \*\*", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert 0 < len(terms) <= 15


def test_the_readme_s_python_runs(tmp_path: Path, palette: Palette, kind: TokenFormat) -> None:
    """On a release of random weights in place of the demo's."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    model = random_model()
    config = weights.ReleaseConfig(
        format=weights.FORMAT, model=model.config, kind=kind, sha256="", classes=[], trained={}
    )
    weights.save_release(str(tmp_path / "demo-out" / "release"), model.state_dict(), palette, config)
    (tmp_path / "demo-out" / "picture.png").write_bytes(png(np.zeros((9, 9, 3), np.uint8)))
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        names: dict[str, Any] = {}
        exec(code[0], names)
    finally:
        os.chdir(here)
    assert len(names["pictures"]) == 4
    assert names["features"].shape == (1, 32)
    assert names["nats"].shape == (1,)
