"""The house: floors import only downwards, and the README's tree is the tree."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = {"config", "storage", "errors"}
FILES = sorted([*ROOT.glob("igpt_ray/**/*.py"), *ROOT.glob("jobs/*.py")])


def floor_of(path: Path) -> int:
    inside = path.relative_to(ROOT).parts
    if inside[0] == "jobs":
        return 3
    if "flows" in inside:
        return 2
    return 0 if path.stem in GROUND else 1


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_of(name: str) -> Path | None:
    """The file of ours behind `igpt_ray.flows.train.pretrain`; None if it is somebody else's."""
    parts = name.split(".")
    if parts[0] not in ("igpt_ray", "jobs"):
        return None
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file() and length > 1:
            return path / "__init__.py"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_its_own_floor_or_below(path: Path) -> None:
    for name in imports_of(path):
        target = file_of(name)
        if target is not None:
            assert floor_of(target) <= floor_of(path), f"{path} imports {name} from a floor above"
        if name.split(".")[0] == "ray":
            assert floor_of(path) >= 2, f"{path} imports {name}; only flows/ and jobs/ may"


def test_what_is_outside_knows_jobs_by_their_command_line_alone() -> None:
    for path in [*ROOT.glob("cluster/**/*.py"), *ROOT.glob("infra/**/*.py")]:
        assert not [name for name in imports_of(path) if name.split(".")[0] in ("igpt_ray", "jobs", "ray")]


def test_the_walk_would_see_a_forbidden_import(tmp_path: Path) -> None:
    """Guards the guard: imports inside functions count, and names resolve to their files."""
    (tmp_path / "f.py").write_text("def f():\n    from igpt_ray.flows import train\n    import ray.data\n")
    assert imports_of(tmp_path / "f.py") == {"igpt_ray.flows.train", "ray.data"}
    assert file_of("igpt_ray.flows.train") == ROOT / "igpt_ray/flows/train.py"
    assert file_of("igpt_ray.data.palette.Palette") == ROOT / "igpt_ray/palette.py"
    assert file_of("igpt_ray.data.sources.plan") == ROOT / "igpt_ray/sources/__init__.py"


def test_the_readme_s_tree_names_every_file_with_a_clause() -> None:
    tree = re.search(r"```\n(jobs/ .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree
    named = set()
    folder = ""
    for line in tree[1].splitlines():
        name, _, clause = line.strip().partition("  ")
        assert clause.strip(), f"{name} has no clause"
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        named.add(name if not line.startswith(" ") else folder + name)
    beside = [p for place in ("cluster", "infra") for p in ROOT.glob(f"{place}/**/*") if p.is_file()]
    real = {str(p.relative_to(ROOT)) for p in [*FILES, *beside] if "__pycache__" not in p.parts}
    real -= {"igpt_ray/__init__.py", "igpt_ray/flows/__init__.py", "igpt_ray/flows/bench/__init__.py"}
    assert {name for name in named if not name.endswith("/")} == real
