"""Places: one URI names a file, locally (`/a/b`, `file:///a/b`) or in a bucket (`s3://bucket/a/b`).

Every byte the project keeps goes through here. A write is atomic: readers see the old object or the new one, never
a part (locally a rename, in a bucket one PUT or a completed multipart upload). `write_new` is also conditional: of
several writers exactly one wins. Failures arrive as `StorageError` with the URI and a hint, retried as `RETRIES` says.

Endpoints and credentials come from the standard AWS chain (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, instance roles ...).
"""

import errno
import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import unquote

from igpt_ray.errors import NotFound, StorageError

if TYPE_CHECKING:
    from botocore.config import Config

T = TypeVar("T")

CACHE = Path.home() / ".cache" / "igpt_ray"
"""Where a node keeps what it can always make or fetch again: colour tables, token caches."""

RETRIES = 10
"""Attempts per request (503, 429, 500, dropped connections), with botocore's jittered exponential back-off."""

SILENCE = 30.0
"""Seconds that an S3 server may say nothing, before or within an answer, until it is asked again."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a full disk, or of a user who has had their share of it."""

PART, PARTS_AT_ONCE = 16 << 20, 8
"""Bytes of a part of a large file that comes down, and how many do at once."""


class Entry(NamedTuple):
    """One stored file."""

    uri: str
    size: int
    """Bytes."""


def absolute(uri: str) -> str:
    """The one spelling of a place: no trailing slash, local paths absolute and without `file://`.

    Settings pass through here where they are read, because Ray's workers have other working directories.
    Raises `StorageError` for an empty URI or a scheme that is not supported.
    """
    if not uri:
        raise StorageError("an empty URI: expected a local path, file:// or s3://bucket/key")
    scheme, slashes, rest = uri.partition("://")
    if not slashes:
        return str(Path(uri).expanduser().absolute())
    if scheme == "s3":
        if not rest.partition("/")[0]:
            raise StorageError(f"{uri!r} names no bucket: expected s3://bucket/key")
        return uri.rstrip("/")
    if scheme == "file":
        if not rest.startswith("/"):  # file://a/b would mean /b on the host `a`
            raise StorageError(f"{uri!r} is not absolute: expected three slashes, file:///a/b")
        return str(Path(unquote(rest)).absolute())
    raise StorageError(f"{uri!r}: scheme {scheme!r} is not supported; use a local path, file:// or s3://")


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
    """The bytes of a file, or `length` of them from `start`; fewer at its end. Raises `NotFound` or `StorageError`."""
    with _errors(uri):
        if is_s3(uri):
            return _read_s3(uri, start, length)
        with open(uri, "rb") as f:
            f.seek(start)
            if length is not None:  # Python would first make room for all that is asked for
                length = min(length, max(0, os.fstat(f.fileno()).st_size - start))
            return f.read(length)


def write(uri: str, data: bytes) -> None:
    """Store `data` under `uri`, replacing what was there."""
    with _errors(uri):
        if is_s3(uri):
            bucket, key = _split(uri)
            _s3().put_object(Bucket=bucket, Key=key, Body=data)
            return
        with _beside(uri, len(data)) as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            os.replace(temporary, uri)


def write_new(uri: str, data: bytes) -> bool:
    """Store `data` only if nothing is there. True if this call wrote it, False if somebody else had.

    In a bucket this is a conditional PUT (`If-None-Match: *`), which S3 and most servers enforce; on a server that
    ignores it the last writer wins.
    """
    with _errors(uri):
        if is_s3(uri):
            return _put_if_absent(*_split(uri), data)
        with _beside(uri, len(data)) as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            try:
                os.link(temporary, uri)
            except FileExistsError:
                return False
            return True


def upload(path: Path, uri: str) -> None:
    """Store a local file of any size under `uri`, in parts where the store wants that."""
    with _errors(uri):
        if is_s3(uri):
            _upload_s3(path, uri)
            return
        with _beside(uri, path.stat().st_size) as temporary:
            shutil.copyfile(path, temporary)
            _sync(temporary)
            os.replace(temporary, uri)


def download(uri: str, path: Path) -> None:
    """Bring a file of any size to the local `path`; the path appears only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _errors(uri), _beside(str(path), None if is_s3(uri) else os.path.getsize(uri)) as temporary:
        if is_s3(uri):
            _download_s3(uri, temporary)
        else:
            shutil.copyfile(uri, temporary)
        os.replace(temporary, path)


def walk(uri: str) -> Iterator[Entry]:
    """Every file below `uri`, in the order of their URIs. Names that begin with a dot are passed over.

    Yields nothing where there is nothing; raises `StorageError` if the bucket is missing or refuses.
    """
    with _errors(uri):
        if is_s3(uri):
            yield from _walk_s3(uri)
        else:
            yield from _walk_local(uri)


def leftovers(uri: str) -> Iterator[Entry]:
    """Temporary files below a local `uri` of writes that were killed, or are under way; in a bucket there are none."""
    if not is_s3(uri):
        with _errors(uri):
            for path in sorted(Path(uri).rglob(".*.*")):
                if TEMPORARY.fullmatch(path.name) and path.is_file():
                    yield Entry(str(path), path.stat().st_size)


def exists(uri: str) -> bool:
    """Whether a file (not a folder) is stored under `uri`."""
    if not is_s3(uri):
        return os.path.isfile(uri)
    try:
        with _errors(uri):
            bucket, key = _split(uri)
            _s3().head_object(Bucket=bucket, Key=key)
    except NotFound:
        return False
    return True


def delete(uri: str) -> None:
    """Remove a file; nothing happens if it is not there."""
    with _errors(uri):
        if is_s3(uri):
            bucket, key = _split(uri)
            _s3().delete_object(Bucket=bucket, Key=key)
        else:
            Path(uri).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ local files

TEMPORARY = re.compile(r"\..+\.\w{8}")
"""What `_beside` calls its files."""


@contextmanager
def _beside(uri: str, n_bytes: int | None = None) -> Iterator[Path]:
    """A temporary path in the same folder (so that a rename is atomic), removed whatever happens.

    Of a full disk it says how much room a file of `n_bytes` lacks.
    """
    folder, final = os.path.split(uri)
    os.makedirs(folder, exist_ok=True)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{final}.", dir=folder)
        os.close(handle)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from other users of a shared disk
        try:
            yield Path(temporary)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise disk_full_error(uri, n_bytes) from error


def disk_full_error(uri: str, n_bytes: int | None = None) -> StorageError:
    """The error of a local file of `n_bytes` for which its disk has no room."""
    need = "more bytes than that" if n_bytes is None else f"{n_bytes} bytes"
    free = shutil.disk_usage(os.path.dirname(uri)).free
    return StorageError(f"{uri}: its disk is full: {free} bytes are free, {need} are needed; make room and repeat")


def _sync(path: Path) -> None:
    """Flush to disk before the rename, or a power cut could leave a complete name on an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _walk_local(uri: str) -> Iterator[Entry]:
    """Depth first; a folder sorts as its name with a slash, so the order equals that of a bucket's keys.

    What is removed meanwhile is passed over; a link to nothing is an error.
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
            size = entry.stat().st_size
        except FileNotFoundError:
            if entry.is_symlink():
                raise
            continue
        yield Entry(entry.path, size)


# ------------------------------------------------------------------------------------------------ buckets


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _read_s3(uri: str, start: int, length: int | None) -> bytes:
    from botocore.exceptions import ClientError

    bucket, key = _split(uri)
    if start == 0 and length is None:
        return _get(Bucket=bucket, Key=key)
    # HTTP has no empty range: ask for one byte more, and drop it.
    last = "" if length is None else start + length
    try:
        data = _get(Bucket=bucket, Key=key, Range=f"bytes={start}-{last}")
    except ClientError as error:
        if error.response["Error"]["Code"] != "InvalidRange":
            raise
        return b""  # the range begins at the end or after it: nothing, as in a local file
    return data[:length]


def _upload_s3(path: Path, uri: str) -> None:
    def ask() -> bool | None:
        try:
            _s3().upload_file(str(path), *_split(uri))
        except KeyError:  # an answer cut within its headers lacks the id of the upload, or a part's tag
            return None
        return True

    _whole(uri, ask)


def _download_s3(uri: str, path: Path) -> None:
    """Parts side by side, each asked for until it is whole.

    boto3's `download_file` waits for ever if an answer breaks off within its headers.
    """
    bucket, key = _split(uri)
    first = next(_list(bucket, key), None)  # of the keys that begin with `key` the first is `key` itself
    if first is None or first["Key"] != key:
        raise NotFound(f"{uri} does not exist at {_s3().meta.endpoint_url}")

    def fetch(start: int) -> int:
        data = _read_s3(uri, start, PART)
        with open(path, "r+b") as f:
            f.seek(start)
            return f.write(data)

    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        fetched = sum(pool.map(fetch, range(0, first["Size"], PART)))
    if fetched != first["Size"]:
        raise StorageError(f"{uri} was replaced by a shorter file while it came down: try again")


def _get(**request: str) -> bytes:
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    def ask() -> bytes | None:
        answer = _s3().get_object(**request)
        try:
            body = bytes(answer["Body"].read())
        except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
            return None
        return body if len(body) == answer.get("ContentLength") else None

    return _whole(f"s3://{request['Bucket']}/{request['Key']}", ask)


def _whole(uri: str, ask: Callable[[], T | None]) -> T:
    """Ask until the answer is whole; `ask` returns None where it is not.

    botocore repeats a request until the answer begins; an answer that breaks off, or falls silent, is ours to ask for
    again. If it breaks off within its headers, Python's HTTP client takes what it has for all of them and the body
    for empty, without an error: a file would be empty, a listing without files.
    """
    from botocore.parsers import ResponseParserError

    for _ in range(RETRIES):
        try:
            if (answer := ask()) is not None:
                return answer
        except ResponseParserError:
            continue
    raise StorageError(f"{uri}: {_s3().meta.endpoint_url} broke off {RETRIES} answers in a row: try again later")


def s3_config() -> "Config":
    """How we talk to every S3 server: retries, timeouts, and checksums only where the server asks for them.

    The last because third-party servers refuse botocore's trailing checksums; our own manifests carry sha256.
    """
    from botocore.config import Config

    return Config(
        retries={"mode": "standard", "total_max_attempts": RETRIES},
        connect_timeout=5,
        read_timeout=SILENCE,
        max_pool_connections=32,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


@functools.cache
def _s3() -> Any:
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        # A session of our own: boto3's default one is not safe when several threads make a client at once.
        return boto3.Session().client("s3", config=s3_config())
    except (BotoCoreError, ValueError) as error:
        raise StorageError(
            f"no S3 client with these settings ({error}): check AWS_ENDPOINT_URL, AWS_PROFILE and the AWS keys"
        ) from error


def _put_if_absent(bucket: str, key: str, data: bytes) -> bool:
    from botocore.exceptions import ClientError

    attempt = 1
    while True:
        try:
            _s3().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return True
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 412:
                return False
            if status != 409 or attempt >= RETRIES:
                raise
            time.sleep(0.1 * attempt)  # 409: another writer was under way; ask again who won
            attempt += 1


def _walk_s3(uri: str) -> Iterator[Entry]:
    bucket, key = _split(uri)
    prefix = f"{key}/" if key else ""
    for item in _list(bucket, prefix):
        relative_to = item["Key"][len(prefix) :]
        if relative_to.endswith("/") or any(part.startswith(".") for part in relative_to.split("/")):
            continue
        yield Entry(f"s3://{bucket}/{item['Key']}", item["Size"])


def _list(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    request = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = _whole(f"s3://{bucket}/{prefix}", partial(_page, request))
        yield from page.get("Contents", [])
        if not page["IsTruncated"]:
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _page(request: dict[str, str]) -> dict[str, Any] | None:
    page: dict[str, Any] = _s3().list_objects_v2(**request)
    return page if "IsTruncated" in page else None  # every whole listing says whether it goes on


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Say every failure of the disk or the object store in our own words."""
    try:
        yield
    except Exception as error:
        if is_s3(uri) and type(error).__module__.startswith(("botocore", "boto3", "s3transfer")):
            raise _s3_error(uri, error) from error  # first: some of botocore's errors are an OSError too
        if isinstance(error, FileNotFoundError):
            raise NotFound(f"{uri} does not exist") from error
        if isinstance(error, OSError):
            raise StorageError(f"{uri}: {error.strerror or error}") from error
        raise


def _s3_error(uri: str, error: BaseException) -> StorageError:
    bucket = _split(uri)[0]
    endpoint = _s3().meta.endpoint_url
    if type(error).__name__ == "S3UploadFailedError" and error.__context__ is not None:
        error = error.__context__  # boto3's upload_file wraps the server's answer
    response = getattr(error, "response", None) or {}  # botocore's connection errors have one that is None
    code = response.get("Error", {}).get("Code", type(error).__name__)
    if code == "NoSuchBucket":
        return NotFound(f"bucket {bucket!r} does not exist at {endpoint}: create it, or mend {uri}")
    if code in ("NoSuchKey", "404"):
        return NotFound(f"{uri} does not exist at {endpoint}")
    if code in ("NoCredentialsError", "CredentialRetrievalError"):
        return StorageError(
            f"{uri}: no credentials for {endpoint}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
            " a profile, or an instance role"
        )
    if code in ("AccessDenied", "403", "SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken"):
        return StorageError(
            f"{uri}: {endpoint} refused the key ({code}): check AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, and that the role may reach this bucket"
        )
    if code in ("EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "SSLError"):
        return StorageError(f"{uri}: {endpoint} cannot be reached ({code}): check AWS_ENDPOINT_URL and the network")
    if code == "ReadTimeoutError":
        return StorageError(
            f"{uri}: {endpoint} took the request and said nothing for {SILENCE:g} s, {RETRIES} times in a row: check"
            " that it is an S3 server and well, then repeat"
        )
    return StorageError(f"{uri}: {endpoint} failed ({code}): {' '.join(str(error).split())}")
