"""The torch device of an actor, by the GPUs that Ray assigned to it."""

import ray

from igpt_ray.device import device_of


def assigned_device() -> str:
    """`cuda:0` in an actor to which Ray assigned a GPU, otherwise `cpu`; outside a Ray cluster `cpu`.

    Ray does not hide the GPUs of a node from actors without GPUs. Raises `SettingError` if a GPU is assigned and torch
    cannot use it.
    """
    return str(device_of(len(ray.get_gpu_ids()) if ray.is_initialized() else 0))
