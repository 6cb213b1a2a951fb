"""Cluster files with the names of your account in them: from `cluster/` and `build/site.env` to a file to apply.

python cluster/render.py cluster/aws.yaml build/aws.yaml
python cluster/render.py cluster/aws.yaml build/serve.yaml Cluster=igpt-serve WorkerProfile=arn:aws:iam::...
python cluster/render.py cluster/kuberay build/kuberay -- python jobs/pretrain.py igpt-s --data.tokens s3://bucket/tokens

In the files `${Region}` is a line of site.env, or a word `Region=value` given here; `${RayVersion}` is pyproject's,
`${Words}` what comes behind `--`, `${Job}` the job's name in it, and `${Name}` the same unless a word says otherwise.
`s3://bucket` is your bucket. `!include` puts another file there, `!text` its text. Whatever has no value is named, and
nothing is written.
"""

import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SITES = (HERE / "site.env", HERE.parent / "build" / "site.env")
NAME = re.compile(r"\$\{(\w+)\}")


def site() -> dict[str, str]:
    """The lines of site.env: all names from the repository's, their values from yours."""
    lines = [line for path in SITES if path.exists() for line in path.read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def ray_version() -> str:
    """Of pyproject.toml, which is the one place for it."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    return next(found[1] for need in project["dependencies"] if (found := re.match(r"ray\[.*\]==(.*)", need)))


def names(words: list[str]) -> dict[str, str]:
    """All that `${...}` may say: site.env, what follows from the repository, and the words given."""
    given, job = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    name = next((Path(word).stem for word in job if word.startswith("jobs/")), "")
    found = {"Cluster": "igpt", "RayVersion": ray_version(), "Words": shlex.join(job), "Job": name, "Name": name}
    return found | site() | dict(word.split("=", 1) for word in given)


def render(path: Path, names: dict[str, str]) -> Any:
    """The parsed file, filled in. Raises `SystemExit` naming what has no value."""

    class Loader(yaml.SafeLoader):
        pass

    def inside(fill: Callable[[Path], Any]) -> Callable[[Any, Any], Any]:
        return lambda loader, node: fill(path.parent / loader.construct_scalar(node))

    Loader.add_constructor("!include", inside(lambda file: render(file, names)))
    Loader.add_constructor("!text", inside(lambda file: file.read_text()))
    documents = [fill(document, names, path) for document in yaml.load_all(path.read_text(), Loader)]
    return documents[0] if len(documents) == 1 else documents


def fill(value: Any, names: dict[str, str], path: Path) -> Any:
    if isinstance(value, dict):
        return {key: fill(below, names, path) for key, below in value.items()}
    if isinstance(value, list):
        return [fill(below, names, path) for below in value]
    if not isinstance(value, str):
        return value

    def named(match: re.Match[str]) -> str:
        if not names.get(match[1]):
            sys.exit(f"error: {path} wants {match[1]}, which has no value: give it a line in {SITES[1]}")
        return names[match[1]]

    filled = NAME.sub(named, value)
    if "s3://bucket" in filled:
        filled = filled.replace("s3://bucket", NAME.sub(named, "s3://${Bucket}"))
    return filled


def text(rendered: Any) -> str:
    dump = yaml.safe_dump_all if isinstance(rendered, list) else yaml.safe_dump
    return dump(rendered, sort_keys=False, width=10_000)


def main(source: Path, target: Path, words: list[str]) -> None:
    found = names(words)
    files = sorted(source.rglob("*.yaml")) if source.is_dir() else [source]
    done = {target / file.relative_to(source) if source.is_dir() else target: render(file, found) for file in files}
    for file, rendered in done.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text(rendered))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
