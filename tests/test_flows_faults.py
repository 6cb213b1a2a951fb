"""An object store that answers 503, resets and cuts: the same manifest, the same hashes, in bounded time."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Keyed
from faults import FaultProxy, running, seeded

from igpt_ray import storage
from igpt_ray.shards import TokenStore

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.ray
def test_a_preparation_through_faults_ends_with_the_same_shards(
    prepared: str, digit_images: str, rclone_s3: Keyed, aws: Callable[..., None], on_rclone: str
) -> None:
    """A fifth of all requests fail, some after they took effect; the job has a Ray of its own, with the key."""
    for entry in storage.walk(digit_images):
        storage.write(f"{on_rclone}/images{entry.uri.removeprefix(digit_images)}", storage.read(entry.uri))
    storage.write(f"{on_rclone}/palette.npy", storage.read(f"{prepared}/palette.npy"))
    words = ["--source", f"{on_rclone}/images", "--palette", f"{on_rclone}/palette.npy"]
    words += ["--tokens", f"{on_rclone}/tokens", "--shard-images", "50"]
    words += ["--pixels.n-px", "8", "--pixels.crop", "centre"]
    proxy = FaultProxy(int(rclone_s3.endpoint.rsplit(":", 1)[1]), seeded(2, 10_000, 0.2))
    with running(proxy) as endpoint:
        env = {**os.environ, "AWS_ENDPOINT_URL": endpoint, "RAY_ADDRESS": "local"}
        command = [sys.executable, "jobs/prepare.py", *words]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert proxy.faults > 20
    through_faults = TokenStore.open(f"{on_rclone}/tokens").manifest
    assert through_faults.shards == TokenStore.open(f"{prepared}/tokens").manifest.shards
