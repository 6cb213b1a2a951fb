"""A node's cache: arrays that can always be made again, memory-mapped so that the node's processes share them.

A file is the array's bytes and, behind them, their sha256. Every process checks it when it opens the file, at a
gigabyte or so a second, because disks outlive training runs and bits flip: what is damaged is named, and made again.
"""

import fcntl
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from igpt_ray import storage
from igpt_ray.errors import StorageError

log = logging.getLogger(__name__)

Pieces = Callable[[], Iterator[NDArray[np.uint16]]]
SHA256_BYTES = 32


def mapped(path: Path, shape: tuple[int, ...], pieces: Pieces) -> NDArray[np.uint16]:
    """The array of this shape at `path`; where it is missing or damaged, one process makes it from its `pieces`.

    The others wait meanwhile. Raises `StorageError` if the disk has no room for it.
    """
    n_bytes = 2 * math.prod(shape)
    if not _is_whole(path, n_bytes):
        with _errors(path, n_bytes), _locked(path.with_suffix(".lock")):
            if path.exists() and not _is_whole(path, n_bytes):  # else another process has just made it
                log.warning("%s is damaged: it is made again", path)
                path.unlink()  # whoever has it mapped keeps it; the room is needed
            if not path.exists():
                _make(path, n_bytes, pieces)
    return np.memmap(path, np.uint16, "r", shape=shape)


def _is_whole(path: Path, n_bytes: int) -> bool:
    if not path.exists() or path.stat().st_size != n_bytes + SHA256_BYTES:
        return False
    content = np.memmap(path, np.uint8, "r")
    return hashlib.sha256(content[:n_bytes].data).digest() == content[n_bytes:].tobytes()


def _make(path: Path, n_bytes: int, pieces: Pieces) -> None:
    """Not synced to disk: a power cut may tear it, and then it will be made again."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed; before the disk is looked at
    if shutil.disk_usage(path.parent).free < n_bytes:
        raise storage.disk_full_error(str(path), n_bytes)
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as f:
            for piece in pieces():
                digest.update(piece.data)
                f.write(piece.data)
            assert f.tell() == n_bytes, f"{f.tell()} bytes for {path}, expected {n_bytes}"
            f.write(digest.digest())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _errors(path: Path, n_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in storage.FULL
        raise (
            storage.disk_full_error(str(path), n_bytes) if full else StorageError(f"{path}: {error.strerror}")
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
