"""Clients of object stores: settings, the retry policy, and `StorageError` for every error.

S3 takes endpoint, region and credentials from boto3's standard chain; Google and Azure from their `GOOGLE_*` and
`AZURE_*` environment variables, as obstore reads them. All requests share one retry policy, `retried`.
"""

import functools
import os
import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from igpt_ray.errors import NotFound, StorageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

RETRIES = 10
"""Attempts per request: after 5xx, 408, 409 and 429, lost connections, timeouts and truncated answers."""

BACKOFF, MAX_BACKOFF = 0.5, 20.0
"""Seconds before the second attempt, and the limit up to which they double; each wait is shortened by up to half."""

CONNECT_TIMEOUT, READ_TIMEOUT = 5.0, 30.0
"""Seconds for a connection, and seconds without a byte from the server, after which an attempt fails."""

UPLOADS_AT_ONCE = 4
"""Concurrent parts of an upload, whose read timeout is as many times longer: it includes the time to send the part."""


ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an instance role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
AMAZON = re.compile(r"https://s3[\w.-]*\.amazonaws\.com(\.cn)?")
"""Endpoints of Amazon's regions. An endpoint of another server has all of its buckets."""
ANONYMOUS = {"s3": "AWS_SKIP_SIGNATURE", "gs": "GOOGLE_SKIP_SIGNATURE", "az": "AZURE_SKIP_SIGNATURE"}
"""Environment variables by URI scheme, for error messages."""


class Bucket(NamedTuple):
    """Clients of one bucket."""

    store: "ObjectStore"
    """Without retries of its own."""
    uploads: "ObjectStore"
    """Retries single parts, so that a failed part does not repeat a whole multipart upload."""
    endpoint: str
    """For error messages."""
    by_boto3: set[bool]
    """Requests that obstore cannot do at this server: True for ranges, False for whole objects."""


class BrokenAnswer(Exception):
    """The server reported success, but did not send what was requested."""


def retried(uri: str, attempt: Callable[[Bucket], T]) -> T:
    """The result of `attempt`, repeated while its error is temporary. Raises `StorageError`."""
    from obstore.exceptions import BaseError

    bucket = bucket_of(uri)
    for n in range(1, RETRIES + 1):
        try:
            return attempt(bucket)
        except (BaseError, BrokenAnswer, FileNotFoundError, ValueError) as error:
            if n == RETRIES or not _temporary(error):
                raise _storage_error(uri, bucket.endpoint, error) from error
        time.sleep(min(MAX_BACKOFF, BACKOFF * 2 ** (n - 1)) * random.uniform(0.5, 1))
    raise AssertionError("RETRIES is less than 1")


def container_of(uri: str) -> str:
    return uri.split("/", 3)[2]


def key_of(uri: str) -> str:
    return uri.split("/", 3)[3] if uri.count("/") > 2 else ""


def bucket_of(uri: str) -> Bucket:
    return _connect(uri.partition(":")[0], container_of(uri))


@functools.cache
def _connect(scheme: str, name: str) -> Bucket:
    from obstore.exceptions import BaseError
    from obstore.store import AzureStore, GCSStore, S3Store

    options: Any = {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT),
        "timeout": timedelta(hours=1),  # of a whole request; READ_TIMEOUT detects a silent server
    }
    if scheme == "s3" and (bundle := os.environ.get("AWS_CA_BUNDLE")):
        options["root_certificate"] = Path(bundle).read_bytes()

    def store(retries: int, read_timeout: float) -> "ObjectStore":
        backoff = {"init_backoff": timedelta(seconds=BACKOFF), "max_backoff": timedelta(seconds=MAX_BACKOFF), "base": 2}
        common: Any = {
            "client_options": options | {"read_timeout": timedelta(seconds=read_timeout)},
            "retry_config": {"max_retries": retries, "backoff": backoff, "retry_timeout": timedelta(minutes=4)},
        }
        if scheme == "gs":
            return GCSStore(name, **common)
        if scheme == "az":
            return AzureStore(name, **common)
        return S3Store(name, **s3_settings, **common)

    s3_settings = _s3_settings(name) if scheme == "s3" else {}
    endpoint = s3_settings["endpoint"] if scheme == "s3" else os.environ.get(ENDPOINTS[scheme])
    try:
        stores = store(0, READ_TIMEOUT), store(RETRIES - 1, UPLOADS_AT_ONCE * READ_TIMEOUT)
    except (BaseError, ValueError) as error:
        raise StorageError(f"{scheme}://{name}: no client with these settings ({_text(error)})") from error
    return Bucket(*stores, endpoint or f"the {scheme}:// service", set())


def _s3_settings(bucket: str) -> dict[str, Any]:
    """Endpoint, region and credentials of boto3's chain; at Amazon, endpoint and region of the bucket."""
    from obstore.auth.boto3 import Boto3CredentialProvider

    meta = s3_client().meta
    if not _anonymous() and _s3_session().get_credentials() is None:
        raise _no_credentials(f"s3://{bucket}", meta.endpoint_url)
    if AMAZON.fullmatch(meta.endpoint_url) and (region := _region_of(bucket)) not in (None, meta.region_name):
        meta = _s3_session().client("s3", region_name=region).meta
    settings = {"endpoint": meta.endpoint_url, "region": meta.region_name, "disable_bulk_delete": True}
    if not _anonymous():
        session = _s3_session()
        # obstore asks again 5 minutes before the end; boto3's temporary credentials are valid for 10 minutes or more.
        settings["credential_provider"] = Boto3CredentialProvider(session, ttl=timedelta(minutes=10))
    return settings


def _region_of(bucket: str) -> str | None:
    """The region of an S3 bucket, which Amazon's answers of any status name; None if there is none."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        answer = s3_client().head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except BotoCoreError:
        return None  # the first request of obstore fails too, and is repeated
    region: str | None = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    return region


def _anonymous() -> bool:
    return os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _s3_session() -> Any:
    import boto3

    # Not boto3's default session, which several threads must not initialise at once.
    return boto3.Session()


@functools.cache
def s3_client() -> Any:
    """A boto3 client: its endpoint and region, and requests that obstore cannot do."""
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    try:
        config = Config(retries={"total_max_attempts": 1}, connect_timeout=CONNECT_TIMEOUT, read_timeout=READ_TIMEOUT)
        return _s3_session().client(
            "s3", config=config.merge(Config(signature_version=UNSIGNED)) if _anonymous() else config
        )
    except (BotoCoreError, ValueError) as error:
        raise StorageError(
            f"no S3 client with these settings ({error}): check AWS_ENDPOINT_URL, AWS_PROFILE and the AWS keys"
        ) from error


def clear_cache() -> None:
    """Read settings and credentials anew."""
    for cached in (_connect, s3_client, _s3_session):
        cached.cache_clear()


# ------------------------------------------------------------------------------------------------ errors

NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
REPEATED = " retries, max_retries: "  # obstore has already repeated this part of an upload
WRONG_REGION = "Received redirect without LOCATION"


def _text(error: BaseException) -> str:
    return " ".join(str(error).partition("\n\nDebug source:")[0].split())


def status_of(error: BaseException) -> int | None:
    """HTTP status; None if the server did not answer, or broke its answer off."""
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else None


def code_of(error: BaseException) -> str:
    """The service's code of an error, or the closest to it."""
    found = re.search(r"<Code>([\w.]+)</Code>", str(error))
    return found[1] if found else str(status_of(error) or type(error).__name__)


def _temporary(error: BaseException) -> bool:
    from obstore.exceptions import GenericError

    if isinstance(error, BrokenAnswer) or code_of(error) == "RequestTimeout":
        return True
    status = status_of(error)
    if not isinstance(error, GenericError) or WRONG_REGION in str(error) or REPEATED in str(error):
        return False
    return status is None or status in (408, 409, 429) or (status >= 500 and status != 501)


def _no_credentials(uri: str, endpoint: str) -> StorageError:
    scheme = uri.partition(":")[0]
    return StorageError(
        f"{uri}: no credentials for {endpoint}: set {CREDENTIALS[scheme]}; for a public bucket {ANONYMOUS[scheme]}=true"
    )


def _storage_error(uri: str, endpoint: str, error: BaseException) -> StorageError:
    from obstore.exceptions import InvalidPathError, PermissionDeniedError, UnauthenticatedError

    scheme = uri.partition(":")[0]
    code, text = code_of(error), str(error)
    if code in NO_BUCKET:
        return NotFound(f"bucket {container_of(uri)!r} does not exist at {endpoint}: create it, or correct {uri}")
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{uri} does not exist at {endpoint}")
    if isinstance(error, InvalidPathError | ValueError):
        found = re.search(r'Path "(.*?)"(?: contained|:)', text, re.DOTALL)
        key = repr(found[1]) if found else f"in {_text(error)!r}"
        return StorageError(
            f"{uri}: the key {key} has an empty, '.' or '..' segment, or a control character, and no such object can be"
            " read: rename or delete it, or choose a folder without it"
        )
    if code == "RequestTimeTooSkewed":
        return StorageError(f"{uri}: {endpoint} refused the request because the clock of this machine is wrong: set it")
    if WRONG_REGION in text:
        return StorageError(f"{uri}: the bucket is in another region than {endpoint}: set AWS_DEFAULT_REGION to it")
    if "token request" in text or (isinstance(error, UnauthenticatedError) and "credential provider" in text):
        return _no_credentials(uri, endpoint)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or "Token" in code or status_of(error) == 403:
        payer = "; if the requester pays for this bucket, set AWS_REQUEST_PAYER=requester"
        return StorageError(
            f"{uri}: {endpoint} refused the key ({code}): check {CREDENTIALS[scheme].split(', ')[0]}, and that the"
            f" role may access this bucket{payer if scheme == 's3' else ''}"
        )
    if "kind: Connect" in text:
        return StorageError(
            f"{uri}: {endpoint} cannot be reached: check {ENDPOINTS[scheme]} and the network: {_text(error)}"
        )
    if "kind: Timeout" in text:
        return StorageError(
            f"{uri}: {endpoint} sent nothing for {READ_TIMEOUT:g} s, {RETRIES} times in a row: check that it is an"
            " object store and works, then repeat"
        )
    return StorageError(f"{uri}: {endpoint} failed ({code}): {_text(error)}")
