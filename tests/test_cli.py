"""The command line: one table, settings checked before anything heavy is imported, jobs/ and `igpt` alike."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import get_origin, get_type_hints

import pytest

from igpt_ray import __version__, cli
from igpt_ray.data.config import PrepareConfig
from igpt_ray.errors import SettingError
from igpt_ray.settings import Result
from igpt_ray.train.config import DataConfig, PretrainConfig, RunConfig

ROOT = Path(__file__).resolve().parent.parent


def test_there_is_a_job_for_every_command_and_a_command_for_every_job() -> None:
    """`demo` needs the repository, so that it is a job alone."""
    assert {path.stem for path in ROOT.glob("jobs/*.py")} - {"demo"} == cli.COMMANDS.keys()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_s_parts_exist_and_its_example_parses(name: str) -> None:
    command = cli.COMMANDS[name]
    module, _, flow = command.flow.partition(":")
    assert callable(getattr(import_module(module), flow))
    words = command.example.split()
    if name == "serve":
        words += ["--host", "127.0.0.1"]
    assert type(cli.parse(name, words, f"igpt {name}")).__name__ == command.settings.partition(":")[2]


def test_the_documented_fields_of_a_command_are_those_that_its_flow_returns() -> None:
    """The table of docs/formats.md."""
    table = re.findall(r"\| (`.*) \| `(\w+)` in `(.*)\.py` \|", (ROOT / "docs" / "formats.md").read_text())
    documented = {}
    for names, kind, path in table:
        for name in re.findall(r"`(\w+)`", names):
            documented[name] = getattr(import_module(path.replace("/", ".")), kind)
    returned = {}
    for name, command in cli.COMMANDS.items():
        module, _, flow = command.flow.partition(":")
        returned[name] = get_type_hints(getattr(import_module(module), flow))["return"]
    assert documented == {name: kind for name, kind in returned.items() if issubclass(get_origin(kind) or kind, Result)}


def test_a_field_that_does_not_apply_is_absent_from_the_json_line() -> None:
    """Null would be a value: an evaluation without a price, a release without a palette."""

    class Evaluated(Result):
        images: int
        price: float | None
        accuracy: float | None = None

    result = Evaluated(images=3, price=None)
    assert result.line() == {"images": 3, "price": None}
    result.accuracy = 0.5
    assert result.line() == {"images": 3, "price": None, "accuracy": 0.5}


def igpt(*words: str, after: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv = ['igpt', *{list(words)!r}]\nfrom igpt_ray.cli import main\n"
    code += f"try:\n    main()\nfinally:\n    pass\n{after}" if after else "main()\n"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_help_names_every_command_and_imports_nothing_heavy() -> None:
    heavy = "print('HEAVY', [m for m in ('torch', 'ray', 'pyarrow', 'boto3', 'faiss', 'tyro') if m in sys.modules])"
    done = igpt("--help", after=heavy)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert all(f"  {name}" in done.stdout for name in cli.COMMANDS)


def test_settings_are_refused_before_ray_and_torch_are_imported() -> None:
    code = (
        "import sys\nfrom igpt_ray import cli\n"
        "try:\n    cli.run('complete', ['--nonsense', '1'])\nexcept SystemExit as error:\n"
        "    print(error.code, [m for m in ('torch', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split("\n")[-2] == "2 []"
    assert "--nonsense" in done.stderr


def test_an_unknown_command_ends_with_the_nearest_name() -> None:
    done = igpt("pretrian")
    assert done.returncode == 2
    assert "did you mean pretrain?" in done.stderr


def test_the_version_is_the_package_s() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert igpt("--version").stdout.strip() == __version__ == declared


def test_a_command_that_needs_no_cluster_starts_none() -> None:
    """`estimate` prints its arithmetic and one JSON line; Ray's start would take seconds."""
    done = igpt("estimate", "tiny", after="import ray; print('STARTED', ray.is_initialized())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("STARTED False\n")
    assert done.stdout.split("\n")[-3].startswith("{")


def test_a_submitted_job_does_not_write_into_the_folder_that_ray_deletes() -> None:
    """A relative --run.root: the weights would be lost with Ray's session."""
    from igpt_ray.flows.job import JOB_FOLDER, check_outputs

    folder = f"/tmp/ray/session_1{JOB_FOLDER}_ray_pkg_1"
    run = PretrainConfig(data=DataConfig(tokens=f"{folder}/tokens"), run=RunConfig(root=f"{folder}/runs"))
    with pytest.raises(SettingError, match=r"--run\.root is .*/runs, a folder of this job that Ray deletes"):
        check_outputs(run, folder)
    check_outputs(run, "/home/user/checkout")
    check_outputs(run.model_copy(update={"run": RunConfig(root="s3://bucket/runs")}), folder)  # tokens are only read
    prepared = PrepareConfig(source="s3://bucket/images", palette="openai", tokens="s3://bucket/tokens")
    check_outputs(prepared, folder)
    with pytest.raises(SettingError, match="--tokens is"):
        check_outputs(prepared.model_copy(update={"tokens": f"{folder}/tokens"}), folder)
