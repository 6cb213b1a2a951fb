"""The protocol of a folder with a manifest: token stores, feature stores, checkpoints and releases.

All files are written first. The manifest, written last, commits the folder: it has the size and sha256 of each file,
and in token and feature stores it ends with the sha256 of its own bytes. Readers verify every file before use.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from zipfile import BadZipFile

from pydantic import ValidationError

from igpt_ray import storage
from igpt_ray.errors import IgptError, NotFound

T = TypeVar("T")

SEAL = ',\n "sha256": "{}"\n}}\n'


def seal(manifest: str) -> bytes:
    """The bytes of a manifest file: its JSON with a last field added, the sha256 of all preceding bytes.

    Without it, a flipped bit in the name of a split could hide a file from readers.
    """
    body = manifest.rstrip().removesuffix("}").rstrip()
    return (body + SEAL.format(hashlib.sha256(body.encode()).hexdigest())).encode()


def unseal(data: bytes) -> bytes | None:
    """The JSON without the field that `seal` added; None if the sha256 is wrong."""
    body = data[: -len(SEAL.format("0" * 64))]
    return body + b"}" if data == body + SEAL.format(hashlib.sha256(body).hexdigest()).encode() else None


def sha256_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read(uri: str, n_bytes: int, sha256: str, error: type[IgptError], command: str) -> bytes:
    """A file of a manifest. Raises `error` if its size or sha256 differs; `command` writes it again."""
    data = storage.read(uri)
    if len(data) != n_bytes or hashlib.sha256(data).hexdigest() != sha256:
        raise error(
            f"{uri} is damaged ({len(data)} bytes, expected {n_bytes} with sha256 {sha256[:12]}...): delete it and"
            f" repeat {command}"
        )
    return data


def load(uri: str, parse: Callable[[bytes], T], error: type[IgptError], missing: str, damaged: str) -> T:
    """The parsed content of a file. Raises `error` with the message `missing` or `damaged`, and the cause."""
    try:
        data = storage.read(uri)
    except NotFound as absent:
        raise error(f"{missing} ({absent})") from absent
    try:
        return parse(data)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise error(f"{damaged} ({where + ': ' if where else ''}{first['msg']})") from invalid
    except (ValueError, KeyError, EOFError, BadZipFile) as malformed:
        raise error(f"{damaged} ({malformed})") from malformed


def download(uri: str, path: Path, sha256: str, error: type[IgptError]) -> None:
    """Copy a file of a manifest to `path`. Raises `error` if it is missing or its sha256 differs."""
    try:
        storage.download(uri, path)
    except NotFound as missing:
        raise error(f"{uri} is missing") from missing
    if sha256_of(path) != sha256:
        raise error(f"{uri} is damaged: its sha256 differs from the manifest")
