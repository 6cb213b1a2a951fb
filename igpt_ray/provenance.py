"""What is written beside every artefact: resolved settings, package versions, git revision."""

import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def provenance(settings: BaseModel) -> dict[str, Any]:
    """What is written beside every artefact: resolved settings, package versions, git revision."""
    packages = ("igpt_ray", "ray", "torch", "faiss-cpu", "faiss-gpu", "pyarrow", "numpy", "pillow")
    versions = {p: v for p in packages if (v := _version(p)) is not None}
    return {"settings": settings.model_dump(mode="json"), "versions": versions, "git": _git_revision()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The checkout's commit, or IGPT_REVISION where there is no .git: in submitted jobs and installed packages."""
    here = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    if not (here / ".git").exists():
        return os.environ.get("IGPT_REVISION")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
