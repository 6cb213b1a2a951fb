"""Preparation and verification on a Ray cluster give what one process gives, also after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igpt_ray import storage
from igpt_ray.data.config import PaletteConfig, VerifyConfig
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import TokenStoreError
from igpt_ray.flows import prepare
from tests.data.test_prepare import PIXELS, settings_for

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]


def test_palette_and_shards_of_a_cluster_equal_those_of_one_process(
    prepared: str, digit_images: str, tmp_path: Path
) -> None:
    palette = str(tmp_path / "palette.npy")
    prepare.fit_palette(PaletteConfig(source=digit_images, out=palette, k=16, pixels=PIXELS))
    assert Palette.load(palette).fingerprint == Palette.load(storage.join(prepared, "palette.npy")).fingerprint
    prepare.prepare(settings_for(digit_images, prepared, tmp_path / "tokens", shard_images=50))
    here, there = (TokenStore.open(root).manifest for root in (str(tmp_path / "tokens"), f"{prepared}/tokens"))
    assert here.shards == there.shards


def test_a_cluster_verifies_every_shard_and_names_a_damaged_one(
    prepared: str, digit_images: str, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    prepare.prepare(settings_for(digit_images, prepared, tokens, shard_images=50))
    assert prepare.verify(VerifyConfig(tokens=str(tokens), remake=2))["shards"] == 4
    damaged = TokenStore.open(str(tokens)).manifest.shards[1].path
    Path(tokens, damaged).write_bytes(b"damaged")
    with pytest.raises(TokenStoreError, match=damaged):
        prepare.verify(VerifyConfig(tokens=str(tokens)))


def test_a_preparation_killed_and_repeated_equals_one_never_killed(
    prepared: str, digit_images: str, tmp_path: Path
) -> None:
    """SIGKILL of the driver with some shards written: nothing twice, nothing lost, the same hashes."""
    tokens = tmp_path / "tokens"
    words = ["--source", digit_images, "--palette", storage.join(prepared, "palette.npy"), "--tokens", str(tokens)]
    words += ["--pixels.n-px", "8", "--pixels.crop", "centre", "--shard-images", "3", "--pool.size", "1"]
    job = subprocess.Popen([sys.executable, "jobs/prepare.py", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(tokens.glob("train/*.parquet")):
        assert job.poll() is None, "the job ended before it could be killed"
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert not (tokens / "manifest.json").exists()
    prepare.prepare(settings_for(digit_images, prepared, tokens, shard_images=3))
    prepare.prepare(settings_for(digit_images, prepared, tmp_path / "undisturbed", shard_images=3))
    killed, undisturbed = TokenStore.open(str(tokens)), TokenStore.open(str(tmp_path / "undisturbed"))
    assert killed.manifest.shards == undisturbed.manifest.shards
    assert len(list(tokens.glob("*/*.parquet"))) == len(killed.manifest.shards)
