"""Every command that the documentation shows names a job that exists, with settings that parse."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
import tyro

from igpt_ray.train.config import EstimateConfig, PretrainConfig
from igpt_ray.train.presets import preset_from_words

ROOT = Path(__file__).resolve().parent.parent
MAKE_TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


JOB = re.compile(r"\bpython (?:jobs/|-m benchmarks ).*")
RENDER = re.compile(r"\bpython cluster/render\.py (\S+) (\S+)")


def commands() -> list[tuple[str, list[str]]]:
    """(where it stands, words) of each `python jobs/...` and `make ...` in the README, in the jobs' docstrings, and in
    the files of `cluster/` and `infra/`: alone, behind `ray job submit ... --`, or in the middle of a shell's line."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    texts = [("README.md", block) for block in blocks]
    texts += [(path.name, path.read_text().split('"""')[1]) for path in sorted(ROOT.glob("jobs/*.py"))]
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
    places = {where for where, _ in commands()}
    assert places >= {"README.md", *(path.name for path in ROOT.glob("jobs/*.py"))}
    assert places >= {"aws.yaml", "gcp.yaml", "render.py", "rayjob.yaml"}


def test_what_the_readme_renders_is_there() -> None:
    text = (ROOT / "README.md").read_text() + "".join(p.read_text() for p in ROOT.glob("cluster/**/*.*"))
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
    job = runpy.run_path(str(ROOT / words[1]))
    source = (ROOT / words[1]).read_text()
    if "run_preset" in source:
        preset_from_words(words[2:], PretrainConfig)
        return
    if "preset_from_words" in source:
        preset_from_words(words[2:], EstimateConfig)
        return
    settings = re.search(r"(?:job\.run(?:_alone)?\([\w.]+, |tyro\.cli\()(\w+)\)", source)
    assert settings, f"{words[1]} does not say which settings it reads"
    tyro.cli(job[settings[1]], args=words[2:])
