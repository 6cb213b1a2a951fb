"""SIGKILL at every step of a preparation's writing, then a repeat: nothing lost, nothing twice, the same bytes.

In one process, without a cluster; test_flows_faults.py kills a worker of one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from igpt_ray import storage
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenStore

ROOT = Path(__file__).resolve().parents[2]
CONDITIONAL = ("manifest.json", "preparation.json")
"""Files that are created by conditional writes."""


class Death(NamedTuple):
    n: int
    about_to: str
    """What the process was about to do; empty for the one that got through."""
    left: dict[str, str]
    """Local stores: file -> sha256 after the death."""
    repeated: dict[str, str]
    """... and after the repeat."""
    exit_code: int
    """Of the repeat."""
    complaint: str


def deaths(pictures: str, palette: Palette, root: str, tmp_path: Path, **others: object) -> list[Death]:
    palette.save(str(tmp_path / "palette.npy"))
    settings: dict[str, Any] = {"source": pictures, "palette": str(tmp_path / "palette.npy"), **others}
    settings |= {"budget": 0.2, "pixels": {"n_px": 4}}
    command = [sys.executable, "tests/support/killed.py", json.dumps(settings), root]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [Death(*json.loads(line)) for line in done.stdout.splitlines()]


def visible(files: dict[str, str]) -> dict[str, str]:
    return {path: sha256 for path, sha256 in files.items() if not Path(path).name.startswith(".")}


@pytest.mark.slow
def test_a_local_store_killed_at_any_step_and_repeated_is_equal(
    pictures: str, palette: Palette, tmp_path: Path
) -> None:
    """Between a temporary file and its rename, between list and shard, before and after the manifest's link."""
    *killed, undisturbed = deaths(pictures, palette, str(tmp_path / "stores"), tmp_path, shard_images=20, holdout=0.3)
    assert (undisturbed.about_to, undisturbed.exit_code) == ("", 0)
    expected = TokenStore.open(str(tmp_path / "stores" / str(undisturbed.n)))
    assert {shard.split for shard in expected.manifest.shards} == {"train", "test", "holdout"}
    for file in undisturbed.left:
        temporary = Path("/", file).with_name(f".{Path(file).name}.")
        for event in ("tempfile.mkstemp", "open", "os.link" if file in CONDITIONAL else "os.rename", "os.remove"):
            assert any(d.about_to.startswith(f"{event} {temporary}") for d in killed), f"never killed at {event} {file}"
    assert {"manifest.json" in death.left for death in killed} == {True, False}
    for death in killed:
        assert death.exit_code == 0, (death.about_to, death.complaint)
        assert visible(death.repeated).keys() == undisturbed.left.keys(), death.about_to
        differing = {path for path in undisturbed.left if death.repeated[path] != undisturbed.left[path]}
        assert differing <= {"manifest.json"}, death.about_to  # whose settings name the place
        assert visible(death.left).items() <= visible(death.repeated).items(), death.about_to
        store = TokenStore.open(str(tmp_path / "stores" / str(death.n)))
        assert store.manifest.shards == expected.manifest.shards, death.about_to
        hidden = {storage.join(store.root, path) for path in death.repeated.keys() - undisturbed.left.keys()}
        assert {entry.uri for entry in storage.leftovers(store.root)} == hidden  # which jobs/verify.py can remove
        assert all(store.read(shard).num_rows == shard.rows for shard in store.manifest.shards)


@pytest.mark.slow
def test_a_bucket_killed_at_any_request_and_repeated_is_equal(
    pictures: str, palette: Palette, on_rclone: str, tmp_path: Path
) -> None:
    """Before a request that changes the bucket, and when it has taken effect."""
    *killed, undisturbed = deaths(pictures, palette, on_rclone, tmp_path, shard_images=20)
    assert (undisturbed.about_to, undisturbed.exit_code) == ("", 0)
    expected = TokenStore.open(f"{on_rclone}/{undisturbed.n}")
    names = sorted(entry.uri.removeprefix(expected.root) for entry in storage.walk(expected.root))
    assert any("manifest.json" in d.about_to and "put" in d.about_to for d in killed)
    for death in killed:
        assert death.exit_code == 0, (death.about_to, death.complaint)
        store = TokenStore.open(f"{on_rclone}/{death.n}")
        assert store.manifest.shards == expected.manifest.shards, death.about_to
        assert sorted(entry.uri.removeprefix(store.root) for entry in storage.walk(store.root)) == names
        assert all(store.read(shard).num_rows == shard.rows for shard in store.manifest.shards)
