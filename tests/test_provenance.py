"""Provenance of programs that run outside a checkout."""

from pathlib import Path

import pytest

from igpt_ray import provenance
from igpt_ray.settings import PoolConfig


def test_a_submitted_job_records_the_revision_that_its_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray uploads a working directory without .git, so its artefacts would not name their code."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "igpt_ray" / "provenance.py"))
    monkeypatch.delenv("IGPT_REVISION", raising=False)
    assert provenance.provenance(PoolConfig())["git"] is None
    monkeypatch.setenv("IGPT_REVISION", "0123abc")
    assert provenance.provenance(PoolConfig())["git"] == "0123abc"
