"""Provenance of artefacts."""

import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def provenance(settings: BaseModel) -> dict[str, Any]:
    """The provenance stored with an artefact: resolved settings, package versions, git revision."""
    packages = ("igpt_ray", "ray", "torch", "faiss-cpu", "faiss-gpu", "pyarrow", "numpy", "pillow")
    versions = {package: version for package in packages if (version := _version(package))}
    return {"settings": settings.model_dump(mode="json"), "versions": versions, "git": _git_revision()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The checkout's commit, or IGPT_REVISION without a .git folder (submitted jobs, installed packages)."""
    here = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    if not (here / ".git").exists():
        return os.environ.get("IGPT_REVISION")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
