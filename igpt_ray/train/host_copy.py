"""A copy of a training state in host memory, made while training continues."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from igpt_ray.train.torch_compat import tree_flatten, tree_unflatten

log = logging.getLogger(__name__)


class HostCopy:
    """A copy of a nested dictionary of tensors, whose memory later copies reuse.

    On a CUDA device, pinned memory is filled on a stream of its own while the current stream goes on. Before the state
    changes, `protect` must be called; before the copy is read, `wait`. On a CPU, the copy is complete at once.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.stream: torch.cuda.Stream | None = None
        self.complete: torch.cuda.Event | None = None

    def update(self, state: dict[str, Any]) -> None:
        """Copy the state as it is after all work on the current stream so far."""
        leaves, shape = tree_flatten(state)
        hosts, shape_before = tree_flatten(self.state)
        if shape != shape_before:
            hosts = _host_memory_for(leaves)
        pairs = [(_local(x), _local(host)) for x, host in zip(leaves, hosts, strict=True) if isinstance(x, Tensor)]

        device = next((x.device for x, _ in pairs if x.device.type == "cuda"), None)
        if device is None:
            _copy(pairs)
        else:
            self.stream = self.stream or torch.cuda.Stream(device)
            self.complete = self.complete or torch.cuda.Event(blocking=True)
            self.stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self.stream):
                _copy(pairs)
            self.complete.record(self.stream)
        whole = [host if isinstance(x, Tensor) else x for x, host in zip(leaves, hosts, strict=True)]
        self.state = tree_unflatten(whole, shape)

    def protect(self) -> None:
        """Make the current stream wait until the copy is complete. The host does not wait."""
        if self.stream is not None and self.complete is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self.complete)

    def wait(self) -> None:
        """Wait until the copy is complete. Called by the thread that reads it.

        The stream of the copy becomes the thread's current one, because torch's checkpoint writer waits for the current
        stream of the current device. Otherwise this would be device 0, and a stream that training uses.
        """
        if self.stream is not None and self.complete is not None:
            torch.cuda.set_device(self.stream.device)
            torch.cuda.set_stream(self.stream)
            self.complete.synchronize()


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for x, host in pairs:
        host.copy_(x, non_blocking=True)


def _host_memory_for(leaves: list[Any]) -> list[Any]:
    """The leaves, with uninitialised host memory in place of tensors; pinned for tensors on a CUDA device."""
    try:
        return _like(leaves, pin=True)
    except RuntimeError as error:
        log.warning("checkpoints are copied to memory that is not pinned, which delays training: %s", error)
        return _like(leaves, pin=False)


def _like(leaves: list[Any], pin: bool) -> list[Any]:
    return [
        torch.empty_like(x, device="cpu", pin_memory=pin and x.device.type == "cuda") if isinstance(x, Tensor) else x
        for x in leaves
    ]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
