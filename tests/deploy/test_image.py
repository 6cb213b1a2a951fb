"""The Dockerfile, which no test builds; versions, image and bucket are each defined in one file."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
CONSTRAINTS_GPU = (ROOT / "constraints-gpu.txt").read_text()
MIN_DRIVER = {"12.8": 570, "12.9": 575, "13.0": 580}
"""Oldest driver branch by CUDA version, from the release notes of the CUDA toolkit."""


def stages() -> dict[str, list[tuple[str, str]]]:
    """(instruction, arguments) by stage; the last has no name."""
    text = (ROOT / "infra" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    found: dict[str, list[tuple[str, str]]] = {}
    name = "before"
    for instruction, words in lines:
        if instruction == "FROM":
            name = words.split(" AS ")[1] if " AS " in words else ""
        found.setdefault(name, []).append((instruction, words))
    return found


def test_the_image_has_cpu_and_gpu_variants_and_does_not_run_as_root() -> None:
    found = stages()
    assert list(found) == ["before", "base", "cpu", "gpu", ""]
    assert found["before"] == [("ARG", "DEVICE=gpu")]
    assert found[""][0] == ("FROM", "${DEVICE}")
    users = [words for instruction, words in found[""] if instruction == "USER"]
    assert users == ["ray"]
    assert any("useradd --create-home --uid 1000 ray" in words for _, words in found["base"])


def test_all_files_that_the_image_copies_exist() -> None:
    copied = [
        words.split()[:-1] for lines in stages().values() for instruction, words in lines if instruction == "COPY"
    ]
    files = [file for files in copied for file in files]
    assert {"igpt_ray", "jobs", "cluster", "constraints.txt", "constraints-gpu.txt"} <= set(files)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_image_installs_the_pinned_versions() -> None:
    """Each installation has an existing extra, and the pinned versions satisfy pyproject.toml."""
    installs = [
        command
        for lines in stages().values()
        for instruction, words in lines
        if instruction == "RUN"
        for command in words.split("&&")
        if "pip install" in command
    ]
    assert len(installs) == 4
    assert all("--constraint constraints.txt" in command or "--no-deps" in command for command in installs)
    (gpu,) = [command for command in installs if "[gpu" in command]
    assert "--constraint constraints-gpu.txt" in gpu
    extras = {extra for group in re.findall(r"\.\[([\w,]+)\]", " ".join(installs)) for extra in group.split(",")}
    assert extras == {"cpu", "gpu", "report"} <= PROJECT["optional-dependencies"].keys()
    for need in PROJECT["dependencies"]:
        name, exact = re.match(r"([\w.-]+)(?:\[[^]]*\])?(?:==(.*))?", need).groups()  # type: ignore[union-attr]
        locked = re.search(rf"^{name}==(.*)$", CONSTRAINTS, re.MULTILINE | re.IGNORECASE)
        assert locked, f"{name} is not locked"
        assert exact in (None, locked[1])


def test_the_gpu_image_has_the_pinned_faiss_and_no_package_in_two_versions() -> None:
    (need,) = [need.split(";")[0] for need in PROJECT["optional-dependencies"]["gpu"]]
    pinned = pins(CONSTRAINTS_GPU)
    name, version = need.split("==")
    assert pinned[name] == version == pins(CONSTRAINTS)["faiss-cpu"]
    assert {"nvidia-cublas-cu12", "nvidia-cuda-runtime-cu12", "nvidia-curand-cu12"} <= pinned.keys()
    assert pinned.keys() & pins(CONSTRAINTS).keys() == set()


def test_the_container_of_the_gpu_image_receives_the_host_s_gpus() -> None:
    """`ray up` starts it with NVIDIA's runtime, which adds GPUs only to containers with NVIDIA_VISIBLE_DEVICES."""
    env = " ".join(words for instruction, words in stages()["gpu"] if instruction == "ENV").split()
    assert set(env) == {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"}
    for name in ("aws.yaml", "gcp.yaml"):
        for kind, node in yaml.safe_load((ROOT / "cluster" / name).read_text())["available_node_types"].items():
            options = node.get("docker", {}).get("worker_run_options", [])
            assert ("--gpus all" in options) == ("GPU" in node["resources"]), (name, kind)


def test_the_machine_images_have_a_driver_for_torch_s_cuda() -> None:
    """An older driver has no GPU for torch. AWS's image is the newest of its family (docs/gpus.md)."""
    cuda = pins(CONSTRAINTS_GPU)["cuda-toolkit"]
    needed = MIN_DRIVER[".".join(cuda.split(".")[:2])]
    if torch.version.cuda:
        assert torch.__version__.split("+")[0] != pins(CONSTRAINTS)["torch"] or cuda.startswith(torch.version.cuda)
    branches = re.findall(r"images/family/\S*-nvidia-(\d+)", (ROOT / "cluster/gcp.yaml").read_text())
    assert branches
    assert all(int(branch) >= needed for branch in branches)
    for name in ("infra/Dockerfile", "docs/gpus.md"):
        assert f"driver >= {needed}" in (ROOT / name).read_text(), name


def pins(constraints: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints, re.MULTILINE))


def test_the_image_s_python_is_supported() -> None:
    (base,) = [words for instruction, words in stages()["base"] if instruction == "FROM"]
    major, minor = map(int, re.match(r"python:(\d+)\.(\d+)", base).groups())  # type: ignore[union-attr]
    lowest, above = (tuple(map(int, v.split("."))) for v in re.findall(r"\d+\.\d+", PROJECT["requires-python"]))
    assert lowest <= (major, minor) < above


# ------------------------------------------------------------------------------------------------ one place each

TEXTS = [
    path
    for folder in ("cluster", "infra", "jobs", "igpt_ray")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".yaml", ".env", ".json", "") and path.is_file() and "__pycache__" not in path.parts
] + [ROOT / "README.md", ROOT / "Makefile"]


def ray_version() -> str:
    return next(need.split("==")[1] for need in PROJECT["dependencies"] if need.startswith("ray["))


def test_ray_s_version_is_defined_in_pyproject_alone() -> None:
    """And in constraints.txt, which the test above compares."""
    version = re.escape(ray_version())
    assert [str(p) for p in TEXTS if re.search(rf"(?<![\d.]){version}(?![\d.])", p.read_text())] == []


def test_the_image_and_the_bucket_are_defined_in_site_env_alone() -> None:
    """Elsewhere they are ${Image} and `s3://bucket`, which cluster/render.py replaces."""
    for path in TEXTS:
        text = path.read_text()
        own = {"demo"} if path.name == "demo.py" else set()  # served by itself, on loopback
        assert set(re.findall(r"s3://([a-z0-9][\w.-]*)", text)) <= {"bucket", "b"} | own, path
        for image in re.findall(r"^\s*(?:- )?image: (.*)$", text, re.MULTILINE) if path.suffix == ".yaml" else []:
            assert image.split("#")[0].strip() == "${Image}" or image.startswith("redis:"), (path, image)


def test_site_env_is_empty_in_the_repository() -> None:
    """It must contain no account's names."""
    lines = [line for line in (ROOT / "cluster/site.env").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) > 10
    assert all(line.endswith("=") for line in lines)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "kuberay/nodes.yaml", "kuberay/rayjob.yaml"])
def test_every_placeholder_is_a_line_of_site_env(name: str) -> None:
    import sys

    sys.path.insert(0, str(ROOT / "cluster"))
    import render

    used = set(re.findall(r"\$\{(\w+)\}", (ROOT / "cluster" / name).read_text()))
    assert used
    assert used <= render.names([]).keys()
