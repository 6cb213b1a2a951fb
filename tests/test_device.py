"""The device of a process follows the requested number of GPUs, never the machine."""

from pathlib import Path

import pytest
import torch

from igpt_ray import device
from igpt_ray.device import device_of
from igpt_ray.errors import SettingError

VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 04:53:49 UTC 2025\n"


def test_without_requested_gpus_the_device_is_the_cpu_on_any_machine() -> None:
    assert device_of(0) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device exists: its absence is not tested")
def test_requested_gpus_that_torch_cannot_use_are_an_error_with_the_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fall-back to the CPU would be slow and unnoticed."""
    (tmp_path / "version").write_text(VERSION)
    monkeypatch.setattr(device, "DRIVER", tmp_path / "version")
    with pytest.raises(SettingError) as raised:
        device_of(0.5)
    for part in ("0.5 GPU(s)", torch.__version__, f"CUDA {torch.version.cuda}", "570.86.15", "request no GPUs"):
        assert part in str(raised.value)
    monkeypatch.setattr(device, "DRIVER", tmp_path / "absent")
    with pytest.raises(SettingError, match="driver none"):
        device_of(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its index is not tested")
def test_requested_gpus_are_the_current_device() -> None:
    assert device_of(1) == torch.device("cuda", torch.cuda.current_device())
