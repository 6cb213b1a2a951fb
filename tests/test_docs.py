"""Every command that the documentation shows names a job that exists, with settings that parse."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from igpt_ray import config

ROOT = Path(__file__).resolve().parent.parent
MAKE_TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands() -> list[tuple[str, list[str]]]:
    """(where it stands, words) of each `python jobs/...` and `make ...` in the README and in the jobs' docstrings."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    texts = [("README.md", block) for block in blocks]
    texts += [(path.name, path.read_text().split('"""')[1]) for path in sorted(ROOT.glob("jobs/*.py"))]
    found = []
    for where, text in texts:
        lines = text.replace("\\\n", " ").splitlines()
        shown = [line for line in lines if line.strip().startswith(("python ", "make "))]
        found += [(where, shlex.split(line, comments=True)) for line in shown]
    return found


def test_the_documentation_has_commands() -> None:
    assert {where for where, _ in commands()} >= {"README.md", *(path.name for path in ROOT.glob("jobs/*.py"))}


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x[:2]))
def test_a_documented_command_parses(where: str, words: list[str]) -> None:
    if words[0] == "make":
        assert words[1] in MAKE_TARGETS
        return
    source = (ROOT / words[1]).read_text()
    if "run_preset" in source:
        config.preset_from_words(words[2:], config.Pretrain)
        return
    if "preset_from_words" in source:  # with the settings that bear the job's name
        config.preset_from_words(words[2:], getattr(config, Path(words[1]).stem.title()))
        return
    if "subcommand_cli_from_dict" in source:  # `bench.py palette` reads config.BenchPalette
        tyro.cli(getattr(config, f"Bench{words[2].title()}"), args=words[3:])
        return
    settings = re.search(r"(?:job\.run(?:_alone)?\([\w.]+, |tyro\.cli\()(\w+)\)", source)
    assert settings, f"{words[1]} does not say which settings it reads"
    tyro.cli(getattr(config, settings[1]), args=words[2:])
