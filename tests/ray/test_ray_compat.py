"""Ray's private names are in one file, and a Ray without them is a clear error."""

import re

import pytest
import ray
from conftest import ROOT

from igpt_ray.errors import SettingError
from igpt_ray.flows import ray_compat

PRIVATE = re.compile(r"\bray\._|\bray\.\w+(\.\w+)*\._|_raylet|__internal_head__|ray\.core\.generated")


def test_private_names_of_ray_are_in_one_file() -> None:
    files = [*ROOT.glob("igpt_ray/**/*.py"), *ROOT.glob("jobs/*.py")]
    assert [path.name for path in files if PRIVATE.search(path.read_text())] == ["ray_compat.py"]


def test_a_ray_without_a_private_name_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ray._raylet, "GcsClient")
    with pytest.raises(SettingError, match=r"lacks an internal interface .*GcsClient.* it was tried on ray 2.60"):
        ray_compat.nodes_at("127.0.0.1:1", "127.0.0.1")
