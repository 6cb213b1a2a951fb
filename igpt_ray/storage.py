"""Files by URI: local (`/a/b`, `file:///a/b`) or in a bucket (`s3://bucket/a/b`, `gs://...`, `az://container/a/b`).

All files of the project are read and written here. A write is atomic: readers see the old or the new file, never a
part (locally a rename, in a bucket one PUT or a completed multipart upload). `write_new` is also conditional: of
several concurrent writers exactly one succeeds. Failures are `StorageError` with the URI and what to do.
"""

import errno
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from igpt_ray import object_store
from igpt_ray.errors import NotFound, StorageError

log = logging.getLogger(__name__)

CACHE = Path.home() / ".cache" / "igpt_ray"
"""A node's folder for files that can always be computed or downloaded again: colour tables, token caches."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and of an exhausted quota."""

REMOTE = ("s3://", "gs://", "az://")


Version = tuple[int, str | None]
"""Bytes of a file, and its ETag in a bucket or its modification time on a disk."""


class Entry(NamedTuple):
    """One stored file."""

    uri: str
    size: int
    """Bytes."""


def absolute(uri: str) -> str:
    """The canonical form of a URI: no trailing slash, local paths absolute and without `file://`.

    Settings are converted where they are parsed, because Ray's workers have other working directories.
    Raises `StorageError` for an empty URI, a missing bucket, an empty or dotted segment of a key, or a scheme that is
    not supported.
    """
    expected = "a local path, file://, s3://bucket/key, gs://bucket/key or az://container/key"
    if not uri:
        raise StorageError(f"an empty URI: expected {expected}")
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return str(Path(uri).expanduser().absolute())
    if is_remote(uri):
        if not rest.partition("/")[0]:
            raise StorageError(f"{uri!r} names no bucket: expected {scheme}://bucket/key")
        uri = uri.rstrip("/")
        if not {"", ".", ".."}.isdisjoint(rest.rstrip("/").split("/")):
            raise StorageError(f"{uri!r} has an empty, '.' or '..' segment: expected {scheme}://bucket/folder/name")
        return uri
    if scheme == "file":
        if not rest.startswith("/"):  # file://a/b would be /b on the host `a`
            raise StorageError(f"{uri!r} is not absolute: expected three slashes, file:///a/b")
        return str(Path(unquote(rest)).absolute())
    raise StorageError(f"{uri!r}: scheme {scheme!r} is not supported: expected {expected}")


def join(uri: str, *names: str) -> str:
    """`join("s3://b/x", "y", "z.png") == "s3://b/x/y/z.png"`."""
    return "/".join([uri.rstrip("/"), *names])


def relative_to(place: str, uri: str) -> str:
    """`relative_to("s3://b/x", "s3://b/x/y/z.png") == "y/z.png"`: undoes `join`."""
    return uri[len(place) + 1 :]


def name(uri: str) -> str:
    """The last part of a URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def read(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes of a file from `start`, fewer at its end; by default all. Raises `NotFound` or `StorageError`."""
    return read_versioned(uri, start, length)[0]


def read_versioned(uri: str, start: int = 0, length: int | None = None) -> tuple[bytes, Version]:
    """`read`, and the version of the file: parts of one file belong together if their versions are equal."""
    if is_remote(uri):
        part = object_store.read(uri, start, length)
        return part.data, (part.size, part.e_tag)
    with _errors(uri), open(uri, "rb") as f:
        status = os.fstat(f.fileno())
        f.seek(start)
        expected = max(0, status.st_size - start)
        if length is not None:  # Python would allocate all of `length` first
            length = expected = min(length, expected)
        data = f.read(length)
        if len(data) != expected:
            raise StorageError(f"{uri} has changed while it was read: repeat the command when it is complete")
        return data, (status.st_size, str(status.st_mtime_ns))


def write(uri: str, data: bytes) -> None:
    """Store `data` under `uri`, replacing what was there."""
    if is_remote(uri):
        object_store.put(uri, data)
        return
    with _errors(uri), _temporary(uri, len(data)) as temporary:
        temporary.write_bytes(data)
        _sync(temporary)
        os.replace(temporary, uri)


def write_new(uri: str, data: bytes) -> bool:
    """Store `data` only if `uri` does not exist. Returns whether this call created it.

    In a bucket this is a conditional PUT (`If-None-Match: *`), which S3, Google, Azure and most servers enforce; on a
    server that ignores it the last writer wins.
    """
    if is_remote(uri):
        return object_store.write_new(uri, data)
    with _errors(uri), _temporary(uri, len(data)) as temporary:
        temporary.write_bytes(data)
        _sync(temporary)
        try:
            os.link(temporary, uri)
        except FileExistsError:
            return False
        return True


def upload(path: Path, uri: str) -> None:
    """Store a local file of any size under `uri`."""
    with _errors(uri):
        if is_remote(uri):
            object_store.put(uri, path)
            return
        with _temporary(uri, path.stat().st_size) as temporary:
            shutil.copyfile(path, temporary)
            _sync(temporary)
            os.replace(temporary, uri)


def download(uri: str, path: Path) -> None:
    """Copy a file of any size to the local `path`, which appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remote = is_remote(uri)
    with _errors(uri), _temporary(str(path), None if remote else os.path.getsize(uri)) as temporary:
        if remote:
            object_store.download(uri, temporary)
        else:
            shutil.copyfile(uri, temporary)
        os.replace(temporary, path)


def walk(uri: str) -> Iterator[Entry]:
    """Every file below `uri`, in the order of the URIs, without names that begin with a dot.

    Yields nothing if nothing exists there; raises `StorageError` if the bucket does not exist or denies access.
    """
    if not is_remote(uri):
        with _errors(uri):
            yield from _walk_local(uri)
        return
    for path, size in object_store.walk(uri):
        if "/." not in path[len(uri.rstrip("/")) :]:
            yield Entry(path, size)


def leftovers(uri: str) -> Iterator[Entry]:
    """Temporary files below a local `uri`, of writes that were killed or are in progress; buckets have none."""
    if not is_remote(uri):
        with _errors(uri):
            for path in sorted(Path(uri).rglob(".*.*")):
                if TEMPORARY.fullmatch(path.name) and path.is_file():
                    yield Entry(str(path), path.stat().st_size)


def exists(uri: str) -> bool:
    """Whether `uri` is a file (not a folder)."""
    return object_store.exists(uri) if is_remote(uri) else os.path.isfile(uri)


def delete(uri: str) -> None:
    """Remove a file, if it exists."""
    if is_remote(uri):
        object_store.delete(uri)
        return
    with _errors(uri):
        Path(uri).unlink(missing_ok=True)


def is_remote(uri: str) -> bool:
    """Whether a URI names a bucket or an object in one."""
    return uri.startswith(REMOTE)


# ------------------------------------------------------------------------------------------------ local files

TEMPORARY = re.compile(r"\..+\.\w{8}")
"""File names of `_temporary`."""


@contextmanager
def _temporary(path: str, n_bytes: int | None = None) -> Iterator[Path]:
    """A temporary file in the folder of `path`, so that a rename to `path` is atomic; always removed at the end.

    `n_bytes` is its expected size, for the error of a full disk.
    """
    folder, final = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{final}.", dir=folder)
        os.close(handle)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would deny the file to other users of a shared disk
        try:
            yield Path(temporary)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise disk_full_error(path, n_bytes) from error


def disk_full_error(path: str, n_bytes: int | None = None) -> StorageError:
    """The error for a local file of `n_bytes` that its disk has no room for."""
    need = "more bytes than that" if n_bytes is None else f"{n_bytes} bytes"
    free = shutil.disk_usage(os.path.dirname(path)).free
    return StorageError(f"{path}: its disk is full: {free} bytes are free, {need} are needed; free space and repeat")


def _sync(path: Path) -> None:
    """Flush to disk before the rename, or a power failure could leave the final name on an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _walk_local(uri: str) -> Iterator[Entry]:
    """Depth first. A folder sorts as its name with a slash, so the order equals that of a bucket's keys.

    Files that are removed meanwhile are skipped; a dangling link is an error. FIFOs, sockets and devices are passed
    over with a warning, because reading one may never end.
    """
    try:
        entries = [e for e in os.scandir(uri) if not e.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in sorted(entries, key=lambda e: e.name + "/" if e.is_dir() else e.name):
        if entry.is_dir():
            yield from _walk_local(entry.path)
            continue
        try:
            status = entry.stat()
        except FileNotFoundError as error:
            if entry.is_symlink():
                raise NotFound(f"{entry.path} is a link to {os.readlink(entry.path)}, which does not exist") from error
            continue
        if stat.S_ISREG(status.st_mode):
            yield Entry(entry.path, status.st_size)
        else:
            log.warning("%s is passed over: it is a FIFO, a socket or a device", entry.path)


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turn errors of the operating system into `StorageError` with the URI."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{uri} does not exist") from error
    except OSError as error:
        raise StorageError(f"{uri}: {error.strerror or error}") from error
