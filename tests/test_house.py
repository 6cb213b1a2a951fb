"""The order of sub-packages: each imports only those before it; and the tree in docs/design.md is the tree."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVELS = (
    ("errors", "interrupt", "object_clients", "object_store", "progress", "provenance", "rng", "settings", "storage"),
    ("artifact", "device"),
    ("model", "data"),
    ("weights", "generate"),
    ("evaluate",),
    ("pretrained", "train"),
    ("serve",),
    ("flows",),
    ("cli",),
    ("jobs", "benchmarks", "__main__"),
)
"""A sub-package may import from its own level and from the levels before it."""
USES_RAY = ("flows", "jobs", "benchmarks")
FILES = sorted([*ROOT.glob("igpt_ray/**/*.py"), *ROOT.glob("jobs/*.py"), *ROOT.glob("benchmarks/*.py")])


def wing_of(path: Path) -> str:
    """`data` for igpt_ray/data/palette.py, `storage` for igpt_ray/storage.py, `jobs` for jobs/demo.py."""
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return rest[0] if first == "igpt_ray" else first


def level_of(path: Path) -> int:
    """-1 for igpt_ray/__init__.py, which imports the rest only when it is used."""
    return next((i for i, wings in enumerate(LEVELS) if wing_of(path) in wings), -1)


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def file_of(name: str) -> Path | None:
    """The project's file behind `igpt_ray.flows.train.pretrain`; None for a name of another package."""
    parts = name.split(".")
    if parts[0] not in ("igpt_ray", "jobs", "benchmarks"):
        return None
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file() and length > 1:
            return path / "__init__.py"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_its_own_level_or_those_before(path: Path) -> None:
    assert path.name == "__init__.py" or level_of(path) >= 0, f"{path} is in no level"
    for name in imports_of(path):
        target = file_of(name)
        if target is not None:
            assert level_of(target) <= level_of(path) or level_of(path) < 0, f"{path} imports {name} from a later level"
        if name.split(".")[0] == "ray":
            assert wing_of(path) in USES_RAY, f"{path} imports {name}; only {', '.join(USES_RAY)} may"


def test_model_and_data_do_not_import_each_other_in_a_circle() -> None:
    imported = {wing: {file_of(name) for path in FILES if wing_of(path) == wing for name in imports_of(path)}
                for wing in ("model", "data", "weights", "generate")}  # fmt: skip
    wings = {wing: {wing_of(path) for path in targets if path is not None} for wing, targets in imported.items()}
    assert not ("data" in wings["model"] and "model" in wings["data"])
    assert not ("weights" in wings["generate"] and "generate" in wings["weights"])


def test_cluster_and_infra_use_jobs_by_their_command_line_alone() -> None:
    for path in [*ROOT.glob("cluster/**/*.py"), *ROOT.glob("infra/**/*.py")]:
        assert not [name for name in imports_of(path) if name.split(".")[0] in ("igpt_ray", "jobs", "ray")]


def test_the_walk_would_see_a_forbidden_import(tmp_path: Path) -> None:
    """Guards the guard: imports inside functions count, and names resolve to their files."""
    (tmp_path / "f.py").write_text("def f():\n    from igpt_ray.flows import train\n    import ray.data\n")
    assert imports_of(tmp_path / "f.py") == {"igpt_ray.flows.train", "ray.data"}
    assert file_of("igpt_ray.flows.train") == ROOT / "igpt_ray/flows/train.py"
    assert file_of("igpt_ray.data.palette.Palette") == ROOT / "igpt_ray/data/palette.py"
    assert file_of("igpt_ray.data.sources.plan") == ROOT / "igpt_ray/data/sources/__init__.py"
    assert level_of(ROOT / "igpt_ray/data/palette.py") < level_of(ROOT / "igpt_ray/flows/train.py")


def test_the_tree_in_the_design_names_every_file_with_a_clause() -> None:
    tree = re.search(r"```\w*\n(jobs/ .*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
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
    files = [p for p in [*FILES, *beside] if "__pycache__" not in p.parts and p.stat().st_size]
    real = {str(p.relative_to(ROOT)) for p in files} - {"igpt_ray/__init__.py", "igpt_ray/flows/__init__.py"}
    assert {name for name in named if not name.endswith("/")} - {
        "igpt_ray/__init__.py",
        "igpt_ray/flows/__init__.py",
    } == real


def test_imports_between_files_have_no_cycle() -> None:
    """Imports inside functions and for type checkers count too. A package's __init__ is where its names are loaded."""
    graph = {path: {file_of(name) for name in imports_of(path)} - {None, path} for path in FILES}
    graphlib.TopologicalSorter(graph).prepare()


def test_files_and_functions_are_short() -> None:
    long_files = {str(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    long_functions = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert (long_files, long_functions.keys()) == ({}, {"igpt_ray/train/loop.py:train"})
