"""A node's cache of arrays that can be recomputed, memory-mapped so that the processes of the node share them.

A file holds the array's bytes followed by their sha256. Every process verifies it when it opens the file, at about
1 GB/s, because files on disk can be corrupted between training runs. A damaged file is logged and written again.
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
    """Memory-map the array of this shape at `path`. If the file is missing or damaged, one process writes it from
    `pieces` while the others wait.

    Raises `StorageError` if the disk does not have enough free space.
    """
    n_bytes = 2 * math.prod(shape)
    if not _is_intact(path, n_bytes):
        with _errors(path, n_bytes), _locked(path.with_suffix(".lock")):
            if path.exists() and not _is_intact(path, n_bytes):  # otherwise another process has just written it
                log.warning("%s is damaged and is written again", path)
                path.unlink()  # existing mappings stay valid; this frees disk space
            if not path.exists():
                _write(path, n_bytes, pieces)
    return np.memmap(path, np.uint16, "r", shape=shape)


def _is_intact(path: Path, n_bytes: int) -> bool:
    if not path.exists() or path.stat().st_size != n_bytes + SHA256_BYTES:
        return False
    content = np.memmap(path, np.uint8, "r")
    return hashlib.sha256(content[:n_bytes].data).digest() == content[n_bytes:].tobytes()


def _write(path: Path, n_bytes: int, pieces: Pieces) -> None:
    """Write the file and rename it. It is not synced: after a power failure it may be damaged and is written again."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)  # left by a killed process; removed before free space is measured
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
