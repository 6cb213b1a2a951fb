"""Faults of an image decoder, for the programs that tests start: Python runs this file when such a program starts.

An image file that ends with a key of `FAULTS` ends the process that reads its header, hangs or slows it, or takes more
memory than an isolated decoder may. The marker goes behind the end of the image, where no decoder looks.
"""

import ctypes
import importlib.util
import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def crash() -> None:
    ctypes.string_at(0)  # reads at address 0


def hang() -> None:
    time.sleep(3600)


def eat_memory() -> None:
    """Reserves 3 GiB. A process that can have them ends as by the kernel when the machine runs out of memory."""
    bytearray(3 << 30)
    os.kill(os.getpid(), signal.SIGKILL)
    hang()  # the signal may take a moment


def be_slow() -> None:
    time.sleep(1)


FAULTS = {b"TEST-CRASH": crash, b"TEST-HANG": hang, b"TEST-MEMORY": eat_memory, b"TEST-SLOW": be_slow}


class Patch:
    """Patches the header reader of `image_files` when it is imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "igpt_ray.data.image_files":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def patched(module: ModuleType) -> None:
            execute(module)
            header_of = module.header_of

            def faulty(data: bytes) -> Any:
                for marker, fault in FAULTS.items():
                    if marker in data[-20:]:
                        fault()
                return header_of(data)

            module.header_of = faulty

        spec.loader.exec_module = patched
        return spec


sys.meta_path.insert(0, Patch())
