"""Objects in buckets: `s3://bucket/key`, `gs://bucket/key`, `az://container/key`, through obstore.

Every answer is compared with its request: truncated data, another range, or an object that is replaced during its
download is an error. All errors are `StorageError`.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from igpt_ray.errors import NotFound, StorageError
from igpt_ray.object_clients import (
    NO_BUCKET,
    UPLOADS_AT_ONCE,
    BrokenAnswer,
    Bucket,
    bucket_of,
    code_of,
    container_of,
    key_of,
    retried,
    s3_client,
    status_of,
)

if TYPE_CHECKING:
    from obstore import ObjectMeta

PART, PARTS_AT_ONCE = 16 << 20, 8
"""Bytes per part of a large download, and the number of concurrent parts."""

UPLOAD_PART = 8 << 20
"""Bytes per part of a large upload."""


class Part(NamedTuple):
    """Bytes of an object from `start`, with the size and ETag of the whole object."""

    data: bytes
    start: int
    size: int
    e_tag: str | None


def read(uri: str, start: int = 0, length: int | None = None) -> Part:
    """`length` bytes of an object from `start`, fewer at its end."""
    stop = None if length is None else start + max(length, 1)  # HTTP has no empty range

    def attempt(bucket: Bucket) -> Part:
        try:
            part = _get(bucket, uri, start, stop)
        except Exception as error:
            if status_of(error) == 416 or AZURE_416 in str(error):  # the object ends before `start`
                return Part(b"", start, 0, None)
            raise
        expected = (part.size if stop is None else min(stop, part.size)) - start
        if (part.start, len(part.data)) != (start, expected):
            raise BrokenAnswer(f"{len(part.data)} bytes from {part.start} instead of {expected} from {start}")
        return part._replace(data=part.data[:length])

    return retried(uri, attempt)


def put(uri: str, data: bytes | Path) -> None:
    """Store bytes or a local file; more than `UPLOAD_PART` bytes as a multipart upload."""
    import obstore

    if (data.stat().st_size if isinstance(data, Path) else len(data)) > UPLOAD_PART:
        parts: Any = {"chunk_size": UPLOAD_PART, "max_concurrency": UPLOADS_AT_ONCE}
        retried(uri, lambda bucket: obstore.put(bucket.uploads, key_of(uri), data, **parts))
    else:
        content = data.read_bytes() if isinstance(data, Path) else data
        retried(uri, lambda bucket: obstore.put(bucket.store, key_of(uri), content, use_multipart=False))


def write_new(uri: str, data: bytes) -> bool:
    """Store `data` if no object has this key. Returns False if one has.

    A server that ignores `If-None-Match`, or does not implement it, lets the last of concurrent writers win.
    """
    import obstore
    from obstore.exceptions import AlreadyExistsError, NotSupportedError

    def attempt(bucket: Bucket) -> bool | None:
        try:
            obstore.put(bucket.store, key_of(uri), data, mode="create", use_multipart=False)
        except AlreadyExistsError as error:
            if "ConditionalRequestConflict" in str(error):  # S3: another write is in progress, the winner is open
                raise BrokenAnswer("409 ConditionalRequestConflict") from error
            return False
        except Exception as error:
            if isinstance(error, NotSupportedError) or status_of(error) == 501:
                return None
            raise
        return True

    created = retried(uri, attempt)
    if created is None and (created := not exists(uri)):
        put(uri, data)
    return bool(created)


def download(uri: str, path: Path) -> None:
    """Write an object to the existing local file `path`, in concurrent parts.

    Raises `StorageError` if the object is replaced meanwhile.
    """
    first = read(uri, 0, PART)
    with open(path, "wb") as f:
        f.write(first.data)

    def fetch(start: int) -> None:
        part = read(uri, start, PART)
        if (part.size, part.e_tag) != (first.size, first.e_tag):
            raise StorageError(f"{uri} was replaced during its download: repeat the command")
        with open(path, "r+b") as f:
            f.seek(start)
            f.write(part.data)

    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        for _ in pool.map(fetch, range(PART, first.size, PART)):
            pass


def walk(uri: str) -> Iterator[tuple[str, int]]:
    """(URI, bytes) of every object below `uri`, in the order of the keys, without folder markers (`folder/`, empty).

    Raises `StorageError` for keys that obstore does not support: with an empty, `.` or `..` segment.
    """
    import obstore

    root, prefix = f"{uri.partition(':')[0]}://{container_of(uri)}", key_of(uri)
    stream: Iterator[Sequence[ObjectMeta]] | None = None
    last = ""

    def next_page(bucket: Bucket) -> Sequence["ObjectMeta"]:
        nonlocal stream
        if stream is None:
            after = f"{last} " if last.endswith("/") else last or None  # obstore drops a slash at the end
            stream = iter(obstore.list(bucket.store, prefix or None, offset=after, chunk_size=1000))
        try:
            return next(stream, ())
        except Exception:
            stream = None  # the next attempt continues after `last`
            raise

    progress = False
    while True:
        page = retried(uri, next_page)
        if not page and not (progress and root.startswith("s3:")):
            return
        if not page:
            # obstore ends if a page of S3 lacks the token of the next: check that nothing follows.
            stream = None
        progress = bool(page)
        for item in page:
            key = item["path"]
            if item["size"] == 0 and (key <= last or not exists(f"{root}/{key}")):
                key += "/"  # a folder marker, whose slash obstore drops
            if key <= last:
                raise StorageError(
                    f"{uri}: {bucket_of(uri).endpoint} lists {key!r} after {last!r}: its listing is incomplete or not"
                    " in the order of the keys"
                )
            if prefix and not key.startswith(f"{prefix}/"):
                raise StorageError(f"{uri}: {bucket_of(uri).endpoint} lists {key!r}, which is not below it")
            last = key
            if not key.endswith("/"):
                yield f"{root}/{key}", item["size"]


def exists(uri: str) -> bool:
    import obstore

    try:
        retried(uri, lambda bucket: obstore.head(bucket.store, key_of(uri)))
    except NotFound:
        return False
    except StorageError as error:
        if UNUSUAL[0] not in str(error):
            raise
    return True


def delete(uri: str) -> None:
    """Remove an object, if it exists."""
    import obstore

    def attempt(bucket: Bucket) -> None:
        try:
            obstore.delete(bucket.store, key_of(uri))
        except FileNotFoundError as error:
            if code_of(error) in NO_BUCKET:
                raise

    retried(uri, attempt)


# ------------------------------------------------------------------------------------------------ requests


def _get(bucket: Bucket, uri: str, start: int, stop: int | None) -> Part:
    import obstore
    from obstore.exceptions import GenericError

    ranged = start > 0 or stop is not None
    unusual = ranged in bucket.by_boto3
    if unusual and (start > 0 or stop is None or False in bucket.by_boto3):
        return _get_by_boto3(uri, start, stop)
    requested: Any = {}  # without a range, the beginning of a small object is read in a usual way
    if ranged and not unusual:
        requested["range"] = {"offset": start} if stop is None else (start, stop)
    try:
        answer = obstore.get(bucket.store, key_of(uri), options=requested)
    except GenericError as error:
        if not uri.startswith("s3:") or not any(text in str(error) for text in UNUSUAL):
            raise
        bucket.by_boto3.add(ranged)
        return _get_by_boto3(uri, start, stop)
    if unusual and stop is not None and answer.meta["size"] > stop:
        return _get_by_boto3(uri, start, stop)
    return Part(answer.bytes().to_bytes(), answer.range[0], answer.meta["size"], answer.meta["e_tag"])


AZURE_416 = "Wanted range starting at"
UNUSUAL = ("Content-Length Header missing", "non-partial response")
"""Answers that obstore refuses and boto3 reads: chunks without a length; ranges with status 200, as rclone sends."""


def _get_by_boto3(uri: str, start: int, stop: int | None) -> Part:
    """For servers with `UNUSUAL` answers. Errors are obstore's."""
    from botocore.exceptions import BotoCoreError, ClientError, ReadTimeoutError
    from botocore.parsers import ResponseParserError
    from obstore.exceptions import GenericError
    from urllib3.exceptions import HTTPError

    ranged = start > 0 or stop is not None
    requested = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if ranged else {}
    try:
        answer = s3_client().get_object(Bucket=container_of(uri), Key=key_of(uri), **requested)
        data = bytes(answer["Body"].read())
    except ClientError as error:
        status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
        kind = FileNotFoundError if status == 404 else GenericError
        raise kind(f"status code: {status}: <Code>{code}</Code>") from error
    except (BotoCoreError, HTTPError, ResponseParserError) as error:
        raise GenericError(f"kind: {'Timeout' if isinstance(error, ReadTimeoutError) else 'Read'}: {error}") from error
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    if "content-length" not in headers and headers.get("transfer-encoding") != "chunked":
        raise BrokenAnswer("an answer without length or chunks")  # may be truncated
    content_range = answer.get("ContentRange", f"bytes 0-/{len(data)}")
    if (found := re.fullmatch(r"bytes (\d+)-\d*/(\d+)", content_range)) is None:
        raise BrokenAnswer(f"Content-Range {content_range}")
    return Part(data, int(found[1]), int(found[2]), answer.get("ETag"))
