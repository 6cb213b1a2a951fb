"""The torch device of a process, by the number of GPUs that were requested for it."""

import re
from pathlib import Path

import torch

from igpt_ray.errors import SettingError

DRIVER = Path("/proc/driver/nvidia/version")


def device_of(gpus: float) -> torch.device:
    """The CPU if `gpus` is 0, otherwise the current CUDA device of the calling thread.

    Raises `SettingError` if GPUs were requested and torch cannot use one. A process to which Ray gave no GPU uses none,
    although Ray does not hide the GPUs of the machine from it.
    """
    if not gpus:
        return torch.device("cpu")
    try:
        torch.cuda.init()  # unlike is_available(), this names the reason
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise SettingError(
            f"{gpus:g} GPU(s) were requested, but torch {torch.__version__} (built for CUDA {torch.version.cuda}) "
            f"cannot use one with NVIDIA driver {_driver_version()}: {str(error).splitlines()[0]}. Install a driver for"
            " this CUDA version, or a torch build for this driver; or request no GPUs"
        ) from error
    return torch.device("cuda", torch.cuda.current_device())


def _driver_version() -> str:
    """The version of the loaded kernel module, such as 580.65.06; `none` if there is no NVIDIA driver."""
    version = re.search(r"\b\d{3}\.\d[\d.]*", DRIVER.read_text()) if DRIVER.exists() else None
    return version[0] if version else "none"
