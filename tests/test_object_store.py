"""Object stores by URI scheme, and answers of servers that differ from Amazon's."""

import base64
import datetime
import hashlib
import hmac
import http.server
import re
import shutil
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from conftest import free_port, serving

from igpt_ray import object_clients, object_store, storage
from igpt_ray.errors import NotFound, StorageError

# ------------------------------------------------------------------------------------------------ gs:// and az://


@pytest.fixture
def on_google(moto_s3: str, aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket by the XML API of Google Cloud Storage, which moto's S3 server understands but for its conditions."""
    monkeypatch.setenv("GOOGLE_BASE_URL", moto_s3)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "any")
    aws(moto_s3)
    name = f"google{free_port()}"  # moto does not decode the name, in which obstore encodes dashes
    object_clients.s3_client().create_bucket(Bucket=name)
    return f"gs://{name}"


ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The public account of Microsoft's emulator."""


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is missing: `npm install --global azurite@3.35.0` provides the Azure emulator")
    port = free_port()
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    with serving([*command, "--skipApiVersionCheck", "--disableTelemetry"], port, tmp_path_factory.mktemp("azurite")):
        yield f"http://127.0.0.1:{port}/{ACCOUNT}"


@pytest.fixture
def on_azure(azurite: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new container at the emulator."""
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    name = f"container-{free_port()}"
    date = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    signed = (
        "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-12-02\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    )
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), signed.encode(), hashlib.sha256)).decode()
    headers = {
        "x-ms-date": date,
        "x-ms-version": "2021-12-02",
        "Authorization": f"SharedKey {ACCOUNT}:{signature}",
    }
    request = urllib.request.Request(f"{azurite}/{name}?restype=container", method="PUT", headers=headers)
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()
    object_clients.clear_cache()
    yield f"az://{name}"
    object_clients.clear_cache()


@pytest.fixture(params=["google", "azure"])
def cloud(request: pytest.FixtureRequest) -> str:
    place: str = request.getfixturevalue(f"on_{request.param}")
    return place


def test_other_clouds_store_and_list_like_s3(cloud: str, tmp_path: Path) -> None:
    """Another encoding of keys, another status at the end of an object, another order."""
    names = ["a.b", "a/b", "empty", "z/é f+g%20", "~"]
    for name in names:
        storage.write(f"{cloud}/x/{name}", b"" if name == "empty" else b"0123456789")
    storage.write(f"{cloud}/x/.hidden", b"1")
    assert [entry.uri for entry in storage.walk(f"{cloud}/x")] == [f"{cloud}/x/{name}" for name in names]
    assert [entry.size for entry in storage.walk(f"{cloud}/x")] == [10, 10, 0, 10, 10]
    uri = f"{cloud}/x/a/b"
    ranges = [(0, 0), (0, 4), (3, 4), (3, None), (8, 9), (10, 4), (12, 1)]
    assert [storage.read(uri, *r) for r in ranges] == [b"", b"0123", b"3456", b"3456789", b"89", b"", b""]
    assert storage.read(f"{cloud}/x/empty", 0, 5) == b""
    assert [storage.exists(f"{cloud}/x{end}") for end in ("/a/b", "/a", "")] == [True, False, False]
    for _ in range(2):
        storage.delete(uri)
    assert not storage.exists(uri)
    big = tmp_path / "big"
    big.write_bytes(bytes(range(256)) * (9 << 12))
    storage.upload(big, f"{cloud}/big")
    storage.download(f"{cloud}/big", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == big.read_bytes()


def test_other_clouds_name_what_is_missing(cloud: str) -> None:
    with pytest.raises(NotFound, match=f"{cloud}/absent does not exist"):
        storage.read(f"{cloud}/absent")
    missing = f"{cloud.partition('://')[0]}://nosuchbucket"
    for call in (
        lambda: storage.read(f"{missing}/a"),
        lambda: storage.write(f"{missing}/a", b"1"),
        lambda: list(storage.walk(missing)),
    ):
        with pytest.raises(NotFound, match="bucket 'nosuchbucket' does not exist"):
            call()


def test_a_new_object_in_azure_is_created_once(on_azure: str) -> None:
    assert storage.write_new(f"{on_azure}/manifest", b"1")
    assert not storage.write_new(f"{on_azure}/manifest", b"2")
    assert storage.read(f"{on_azure}/manifest") == b"1"


# ------------------------------------------------------------------------------------------------ unusual servers


class Unusual(http.server.BaseHTTPRequestHandler):
    """S3's protocol with two keys a page, and what `habit` says otherwise."""

    protocol_version = "HTTP/1.1"
    habit = ""
    objects: dict[str, bytes]
    headers_seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        url = urlsplit(self.path)
        key = unquote(url.path)[1:].partition("/")[2]
        if self.habit in REFUSALS:
            status, code = REFUSALS[self.habit]
            self.answer(status, f"<Error><Code>{code}</Code></Error>".encode())
        elif "list-type" in url.query:
            self.list(parse_qs(url.query))
        elif key not in self.objects:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self.send_object(self.objects[key])

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        key = unquote(urlsplit(self.path).path)[1:].partition("/")[2]
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if "If-None-Match" in self.headers and self.habit == "not implemented":
            self.answer(501, b"<Error><Code>NotImplemented</Code></Error>")
        elif "If-None-Match" in self.headers and self.habit == "conflict":
            type(self).habit = ""
            self.answer(409, b"<Error><Code>ConditionalRequestConflict</Code></Error>")
        else:
            self.objects[key] = data
            self.answer(200, b"", ETag='"1"')

    def list(self, query: dict[str, list[str]]) -> None:
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        if self.habit == "no token, no start":
            after = ""
        prefix = "" if self.habit == "no prefix" else query.get("prefix", [""])[0]
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        items = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.objects[key])}</Size><ETag>1</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys[:2]
        )
        if len(keys) > 2 and not self.habit.startswith("no token"):
            items += f"<NextContinuationToken>{keys[1]}</NextContinuationToken>"
        self.answer(200, f"<ListBucketResult><IsTruncated>true</IsTruncated>{items}</ListBucketResult>".encode())

    def send_object(self, data: bytes) -> None:
        tag = str(len(self.headers_seen)) if self.habit == "replaced" else "1"
        status, headers = 200, {"ETag": f'"{tag}"'}
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last or len(data)) + 1, len(data))
            start += self.habit == "another range"
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[start:stop]
        self.answer(status, data, **headers)

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        chunked = self.habit.startswith("chunked") and status < 300
        self.send_header("Connection", "close")
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(data)))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
            if chunked and self.habit != "chunked, truncated":
                self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        pass


REFUSALS = {
    "skew": (403, "RequestTimeTooSkewed"),
    "region": (301, "PermanentRedirect"),
    "denied": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
}


class OtherRegion(Unusual):
    """Amazon's answers to requests for a bucket in eu-central-1 that are sent to other regions."""

    def do_GET(self) -> None:
        self.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        region = self.headers["Authorization"].split("/")[2] if "Authorization" in self.headers else ""
        if "eu-central-1" in self.headers["Host"] and region in ("", "eu-central-1"):
            super().do_GET()
        else:
            self.answer(301, b"<Error><Code>PermanentRedirect</Code></Error>")

    do_HEAD = do_GET

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        super().answer(status, data, **headers, **{"x-amz-bucket-region": "eu-central-1"})


class Amazon(http.server.ThreadingHTTPServer):
    """An HTTPS proxy behind which every host is `handler`, with a certificate for Amazon's names."""

    def __init__(self, handler: type[Unusual], folder: Path):
        super().__init__(("127.0.0.1", free_port()), handler)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(amazons_certificate(folder))

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.settimeout(10)
        while b"\r\n\r\n" not in connection.recv(1 << 16, socket.MSG_PEEK):
            pass
        assert connection.recv(1 << 16).startswith(b"CONNECT ")
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        return self.tls.wrap_socket(connection, server_side=True), address


def amazons_certificate(folder: Path) -> Path:
    """A certificate of its own authority, and its key, in one PEM file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "s3.amazonaws.com")])
    hosts = [f"{bucket}s3{region}.amazonaws.com" for bucket in ("", "*.") for region in ("", ".eu-central-1")]
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "amazon.pem"
    no_password = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, no_password)
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def amazon(aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[OtherRegion]]:
    """The handler class of a server in place of Amazon; the environment has region us-east-1 and no endpoint."""
    monkeypatch.setattr(object_clients, "RETRIES", 2)
    monkeypatch.setattr(object_clients, "BACKOFF", 0.01)
    handler = type("Handler", (OtherRegion,), {"objects": {}, "headers_seen": []})
    server = Amazon(handler, tmp_path)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    aws("")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "amazon.pem"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
    object_clients.clear_cache()
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def unusual(aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Unusual]]:
    """The server's class. Two attempts a request, without long waits."""
    monkeypatch.setattr(object_clients, "RETRIES", 2)
    monkeypatch.setattr(object_clients, "BACKOFF", 0.01)
    handler = type("Handler", (Unusual,), {"objects": {}, "headers_seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    aws(f"http://127.0.0.1:{server.server_address[1]}")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_answer_in_chunks_is_read_if_it_is_complete(unusual: type[Unusual]) -> None:
    """obstore refuses answers without a length."""
    unusual.objects, unusual.habit = {"file": b"0123456789"}, "chunked"
    assert storage.read("s3://bucket/file") == b"0123456789"
    assert [storage.read("s3://bucket/file", *r) for r in ((0, 4), (3, None), (8, 9))] == [b"0123", b"3456789", b"89"]
    assert storage.exists("s3://bucket/file")
    unusual.habit = "chunked, truncated"
    for start in (0, 3):
        with pytest.raises(StorageError, match="s3://bucket/file"):
            storage.read("s3://bucket/file", start)


def test_another_range_than_the_requested_is_an_error(unusual: type[Unusual]) -> None:
    unusual.objects, unusual.habit = {"file": b"0123456789"}, "another range"
    with pytest.raises(StorageError, match="s3://bucket/file"):
        storage.read("s3://bucket/file", 3, 4)


def test_an_object_that_is_replaced_during_its_download_is_an_error(
    unusual: type[Unusual], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of two versions in one file."""
    monkeypatch.setattr(object_store, "PART", 4)
    unusual.objects = {"file": b"0123456789"}
    storage.download("s3://bucket/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    unusual.habit = "replaced"
    with pytest.raises(StorageError, match="s3://bucket/file was replaced"):
        storage.download("s3://bucket/file", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_listing_is_complete_or_an_error(unusual: type[Unusual]) -> None:
    """obstore takes a page without the token of the next for the last: images would be missing without an error."""
    unusual.objects = {f"x/{i}": b"1" for i in range(7)}
    for unusual.habit in ("", "no token"):
        assert [entry.uri for entry in storage.walk("s3://bucket/x")] == [f"s3://bucket/x/{i}" for i in range(7)]
    unusual.habit = "no token, no start"
    with pytest.raises(StorageError, match="incomplete or not in the order of the keys"):
        list(storage.walk("s3://bucket/x"))


def test_a_listing_of_another_folder_is_an_error(unusual: type[Unusual]) -> None:
    """The names of these objects would be cut at the length of the requested folder."""
    unusual.objects, unusual.habit = {"other/1": b"1", "x/1": b"1"}, "no prefix"
    with pytest.raises(StorageError, match="lists 'other/1', which is not below it"):
        list(storage.walk("s3://bucket/x"))


def test_folder_markers_are_not_files(unusual: type[Unusual]) -> None:
    """obstore lists the empty object `a/` as `a`: a class folder made in a web console would be an unreadable image."""
    unusual.objects = dict.fromkeys(("x/", "x/a/", "x/b", "x/b-", "x/b/", "x/c", "x/d/", "x/e/"), b"")
    unusual.objects |= {"x/a/1": b"1", "x/a-1": b"1"}
    assert [entry.uri for entry in storage.walk("s3://bucket/x")] == [
        f"s3://bucket/x/{name}" for name in ("a-1", "a/1", "b", "b-", "c")
    ]


@pytest.mark.parametrize("key", ["x/a//b", "x//b", "x/./b", "x/a/..", "x/a//", "x/\x01b"])
def test_a_key_that_is_not_supported_is_named(unusual: type[Unusual], key: str) -> None:
    """Never a class with an empty name, and never an image that is not counted."""
    unusual.objects = {key: b"1", "x/z": b"1"}
    for call in (lambda: list(storage.walk("s3://bucket/x")), lambda: storage.read(f"s3://bucket/{key}")):
        with pytest.raises(StorageError, match=f"{re.escape(repr(key))} has an empty.*rename or delete it"):
            call()


def test_servers_without_conditional_writes_still_create_files(unusual: type[Unusual]) -> None:
    unusual.habit = "not implemented"
    assert storage.write_new("s3://bucket/new", b"1")
    assert not storage.write_new("s3://bucket/new", b"2")
    assert unusual.objects == {"new": b"1"}


def test_a_conflict_of_two_writers_is_decided_by_the_next_attempt(unusual: type[Unusual]) -> None:
    """S3 answers 409 while another write is in progress, which may still fail."""
    unusual.habit = "conflict"
    assert storage.write_new("s3://bucket/new", b"1")


def test_public_and_requester_pays_buckets_are_read(
    unusual: type[Unusual], aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unusual.objects = {"file": b"1"}
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    object_clients.clear_cache()
    assert storage.read("s3://bucket/file") == b"1"
    assert unusual.headers_seen[-1]["x-amz-request-payer"] == "requester"
    assert "authorization" in unusual.headers_seen[-1]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    object_clients.clear_cache()
    for unusual.habit in ("", "chunked"):
        assert storage.read("s3://bucket/file") == b"1"
        assert "authorization" not in unusual.headers_seen[-1]


@pytest.mark.parametrize(
    ("habit", "advice"),
    [
        ("skew", "the clock of this machine is wrong"),
        ("region", "set AWS_DEFAULT_REGION"),
        ("denied", "set AWS_REQUEST_PAYER=requester"),
        ("expired", "refused the key (ExpiredToken)"),
    ],
)
def test_a_refusal_says_what_to_do(unusual: type[Unusual], habit: str, advice: str) -> None:
    unusual.habit = habit
    for call in (lambda: storage.read("s3://bucket/redirect"), lambda: list(storage.walk("s3://bucket"))):
        with pytest.raises(StorageError, match=re.escape(advice)):
            call()
    assert len(unusual.headers_seen) == 2


def test_a_bucket_of_another_region_is_read_there(amazon: type[OtherRegion], monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 follows Amazon's redirects; obstore reports an error, whatever AWS_DEFAULT_REGION is."""
    amazon.objects = {"a/file": b"0123456789"}
    assert storage.read("s3://bucket/a/file", 3, 4) == b"3456"
    assert [entry.uri for entry in storage.walk("s3://bucket/a")] == ["s3://bucket/a/file"]
    storage.write("s3://bucket/a/new", b"1")
    assert amazon.objects["a/new"] == b"1"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    object_clients.clear_cache()
    assert storage.read("s3://bucket/a/file") == b"0123456789"
