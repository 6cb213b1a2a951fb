"""An actor uses a GPU if Ray assigned one to it, and is not silently slow if torch cannot use it."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from igpt_ray.flows.device import assigned_device

ACTORS = """
import ray

from igpt_ray.flows.device import assigned_device

ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, logging_level="error")


class Actor:
    def device(self):
        try:
            return assigned_device()
        except Exception as error:
            return f"{type(error).__name__}: {error}"


for gpus in (0, 0.5):
    print(ray.get(ray.remote(num_gpus=gpus)(Actor).remote().device.remote()))
"""


def test_outside_a_cluster_the_device_is_the_cpu() -> None:
    assert assigned_device() == "cpu"


@pytest.mark.slow
def test_the_device_of_an_actor_is_what_ray_assigned_to_it() -> None:
    """Ray reports a GPU here, whether the machine has one or not: as on a node whose driver is too old for torch."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", ACTORS], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    without, with_gpu = done.stdout.strip().splitlines()
    assert without == "cpu"
    if torch.cuda.is_available():
        assert with_gpu == "cuda:0"
    else:
        assert with_gpu.startswith("SettingError: 1 GPU(s) were requested, but torch")
