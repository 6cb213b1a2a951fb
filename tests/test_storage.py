"""Files by URI: local disks and two S3 servers behave alike, writes are atomic, and errors say what to do."""

import http.server
import os
import pickle
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Keyed, free_port

from igpt_ray import errors, object_clients, storage
from igpt_ray.errors import NotFound, StorageError

# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("/a/b", "/a/b"),
        ("/a/b/", "/a/b"),
        ("file:///a/b/", "/a/b"),
        ("file:///a/b%20c#1", "/a/b c#1"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a#b?c", "s3://bucket/a#b?c"),
    ],
)
def test_a_place_has_one_spelling(uri: str, place: str) -> None:
    """Two spellings of a place would be two caches, two manifests, two runs; `#` must not cut a name short."""
    assert storage.absolute(uri) == place
    assert storage.absolute(place) == place


def test_a_relative_path_means_the_folder_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has another working directory: the path must be absolute before it travels."""
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/a") == str(tmp_path / "runs/a")
    assert storage.absolute("~/a") == str(Path.home() / "a")


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("", "expected a local path, file://, s3://"),
        ("ftp://bucket/a", "expected a local path, file://, s3://"),
        ("S3://bucket/a", "expected a local path, file://, s3://"),
        ("s3://", "expected s3://bucket/key"),
        ("s3:///a", "expected s3://bucket/key"),
        ("file://a/b", "expected three slashes"),
    ],
)
def test_what_names_no_place_is_refused_with_advice(uri: str, advice: str) -> None:
    """`ftp://` or `file://a/b` taken for a local path would write to an odd folder and succeed."""
    assert advice in complaint(lambda: storage.absolute(uri))


def test_join_and_name_undo_each_other() -> None:
    """A doubled slash is another key in a bucket."""
    assert storage.join("s3://b/x/", "y", "z.png") == "s3://b/x/y/z.png"
    assert storage.name(storage.join("/a", "z.png")) == "z.png"
    assert storage.relative_to("s3://b/x", storage.join("s3://b/x", "y", "z.png")) == "y/z.png"
    assert storage.name("s3://b/x/") == "x"


# ------------------------------------------------------------------------------------------------ every store alike


def test_what_is_written_is_read_back_and_replaced(place: str) -> None:
    """A store that changes bytes on the way, or keeps the longer of two contents."""
    uri = storage.join(place, "folder", "file.bin")
    for data in (bytes(range(256)) * 40, b"short", b""):
        storage.write(uri, data)
        assert storage.read(uri) == data
        assert storage.exists(uri)


def test_a_range_is_what_a_slice_would_be(place: str) -> None:
    """HTTP counts ranges inclusively, has no empty one, and answers 416 where a file just ends."""
    for content in (b"0123456789", b""):
        uri = storage.join(place, f"{len(content)} bytes")
        storage.write(uri, content)
        for start in (0, 3, 9, 10, 12):
            for length in (0, 1, 4, 100, None):
                assert storage.read(uri, start, length) == content[start:][:length], (start, length)


def test_nothing_is_there_until_it_is_written(place: str, tmp_path: Path) -> None:
    """`NotFound` is how a run knows that it is new: any other error would end it."""
    uri = storage.join(place, "absent")
    assert not storage.exists(uri)
    assert uri in complaint(lambda: storage.read(uri), NotFound)
    assert uri in complaint(lambda: storage.read(uri, 2, 3), NotFound)
    assert uri in complaint(lambda: storage.download(uri, tmp_path / "copy"), NotFound)
    assert list(storage.walk(uri)) == []
    storage.delete(uri)


def test_a_folder_is_not_a_file(place: str) -> None:
    """A prefix that exists would pass for a checkpoint file."""
    storage.write(storage.join(place, "folder", "file"), b"1")
    assert not storage.exists(storage.join(place, "folder"))
    assert storage.exists(storage.join(place, "folder", "file"))


def test_delete_removes_one_file(place: str) -> None:
    """Deleting by prefix would take `ab` with `a`."""
    for name in ("a", "ab"):
        storage.write(storage.join(place, name), b"1")
    storage.delete(storage.join(place, "a"))
    assert [storage.name(e.uri) for e in storage.walk(place)] == ["ab"]


def test_walk_has_the_same_order_everywhere(place: str) -> None:
    """A folder listed by its bare name sorts before `a-b`, in a bucket after it: plans and row orders would differ."""
    names = ["a/b", "a.b", "a-b", "a/c/d", "a0", "B", "~", "z/é f+g%20", "z/b.c", "z/b/c"]
    for name in names:
        storage.write(storage.join(place, "x", name), name.encode())
    for hidden in ("x/.hidden", "x/.git/config", "x/a/.part", "xy/outside"):
        storage.write(storage.join(place, hidden), b"1")
    found = list(storage.walk(storage.join(place, "x")))
    assert [e.uri for e in found] == [storage.join(place, "x", name) for name in sorted(names)]
    assert [e.size for e in found] == [len(name.encode()) for name in sorted(names)]
    assert [storage.read(e.uri).decode() for e in found] == sorted(names)


def test_what_is_removed_while_it_is_walked_over_is_passed_over(tmp_path: Path) -> None:
    """A run lists its checkpoints while a worker removes old ones: that must end neither of them."""
    place = str(tmp_path)
    for name in ("a/1", "a/2", "b/1", "c"):
        storage.write(storage.join(place, name), b"1")
    walk = storage.walk(place)
    assert storage.relative_to(place, next(walk).uri) == "a/1"
    for name in ("a/2", "b/1"):
        storage.delete(storage.join(place, name))
    (tmp_path / "b").rmdir()
    assert [storage.relative_to(place, entry.uri) for entry in walk] == ["c"]


def test_a_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    """A picture whose disk is not mounted would be left out of a token store without a word."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link" in complaint(lambda: list(storage.walk(str(tmp_path))), NotFound)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc, whose files are longer than their size")
def test_a_local_file_of_another_length_than_its_size_is_an_error() -> None:
    """A file that another program is writing."""
    with pytest.raises(StorageError, match="/proc/self/stat has changed while it was read"):
        storage.read("/proc/self/stat")


def test_a_file_of_several_parts_goes_up_and_comes_down(place: str, tmp_path: Path) -> None:
    """A multipart upload: parts in the wrong order, or a server that requires other checksums."""
    original, copy = tmp_path / "original", tmp_path / "new" / "folder" / "copy"
    original.write_bytes(os.urandom(1 << 16) * 144)
    storage.upload(original, storage.join(place, "big"))
    storage.download(storage.join(place, "big"), copy)
    assert copy.read_bytes() == original.read_bytes()


@pytest.mark.parametrize("place", ["local", "moto"], indirect=True)
def test_of_many_writers_of_a_new_file_exactly_one_wins(place: str) -> None:
    """Look first, then write: two preparations would both believe that theirs is the manifest."""
    uri = storage.join(place, "manifest.json")
    together = threading.Barrier(8)

    def write(i: int) -> bool:
        together.wait()
        return storage.write_new(uri, f"writer {i}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert storage.read(uri) == f"writer {won.index(True)}".encode()
    assert not storage.write_new(uri, b"too late")


@pytest.mark.parametrize("place", ["moto", "rclone"], indirect=True)
def test_many_threads_may_be_the_first_to_reach_the_bucket(place: str) -> None:
    """boto3's default session is not safe for that, and `sources.read` starts with sixteen threads."""
    storage.write(storage.join(place, "file"), b"1")
    object_clients.clear_cache()
    together = threading.Barrier(4)

    def read(_: int) -> bytes:
        together.wait()
        return storage.read(storage.join(place, "file"))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [b"1"] * 4


# ------------------------------------------------------------------------------------------------ writes that fail


@contextmanager
def files_limited_to(n: int) -> Iterator[None]:
    """A disk that is full after n bytes, as far as this process can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("how", ["write", "write_new", "upload", "download"])
def test_a_write_that_fails_half_way_leaves_the_old_content_and_nothing_else(how: str, tmp_path: Path) -> None:
    """Writing in place, or a forgotten temporary file that fills the disk further."""
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.write_bytes(bytes(1 << 20))
    folder.mkdir()
    target = folder / "target"
    if how != "write_new":
        target.write_bytes(b"old")
    calls: dict[str, Callable[[], Any]] = {
        "write": lambda: storage.write(str(target), source.read_bytes()),
        "write_new": lambda: storage.write_new(str(target), source.read_bytes()),
        "upload": lambda: storage.upload(source, str(target)),
        "download": lambda: storage.download(str(source), target),
    }
    with files_limited_to(1 << 16):
        assert "too large" in complaint(calls[how])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == ({} if how == "write_new" else {"target": b"old"})


@pytest.mark.parametrize("place", ["moto", "rclone"], indirect=True)
def test_a_download_that_fails_leaves_no_file(place: str, tmp_path: Path) -> None:
    """An empty file where a checkpoint's should be."""
    complaint(lambda: storage.download(storage.join(place, "absent"), tmp_path / "folder" / "copy"))
    assert list((tmp_path / "folder").iterdir()) == []


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    """Temporary files are private by default; on a shared disk the workers would be refused."""
    storage.write(str(tmp_path / "file"), b"1")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


# ------------------------------------------------------------------------------------------------ what users get wrong


def complaint(call: Callable[[], Any], kind: type[StorageError] = StorageError) -> str:
    """The message of the error that `call` must raise: one line."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def every_operation(base: str, folder: Path) -> dict[str, Callable[[], Any]]:
    file = folder / "local"
    file.write_bytes(b"1")
    uri = storage.join(base, "a")
    return {
        "read": lambda: storage.read(uri),
        "read_range": lambda: storage.read(uri, 1, 2),
        "write": lambda: storage.write(uri, b"1"),
        "write_new": lambda: storage.write_new(uri, b"1"),
        "upload": lambda: storage.upload(file, uri),
        "download": lambda: storage.download(uri, folder / "copy"),
        "walk": lambda: list(storage.walk(base)),
        "exists": lambda: storage.exists(uri),
        "delete": lambda: storage.delete(uri),
    }


@pytest.mark.parametrize("place", ["moto", "rclone"], indirect=True)
def test_a_missing_bucket_is_named_by_every_operation(place: str, tmp_path: Path) -> None:
    """An empty listing would read as an empty dataset."""
    operations = every_operation("s3://no-such-bucket/data", tmp_path)
    del operations["exists"]  # a HEAD request has no body: a missing bucket looks like a missing file
    for name, call in operations.items():
        assert "bucket 'no-such-bucket' does not exist" in complaint(call, NotFound), name


def test_a_wrong_key_is_said_by_every_operation(on_rclone: str, rclone_s3: Keyed, aws: Any, tmp_path: Path) -> None:
    """`exists` that says no, or a retry that hides a refusal for minutes."""
    aws(rclone_s3.endpoint, rclone_s3.key, "wrong")
    for name, call in every_operation(on_rclone, tmp_path).items():
        assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in complaint(call), name


def test_an_unreachable_endpoint_is_said_by_every_operation(
    aws: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing mistake in the endpoint must not read like a missing file."""
    monkeypatch.setattr(object_clients, "RETRIES", 1)
    endpoint = f"http://127.0.0.1:{free_port()}"
    aws(endpoint)
    for name, call in every_operation("s3://bucket/data", tmp_path).items():
        text = complaint(call)
        assert endpoint in text, name
        assert "check AWS_ENDPOINT_URL" in text, name


def test_missing_credentials_are_said_by_every_operation(aws: Any, moto_s3: str, tmp_path: Path) -> None:
    """The libraries' errors name neither the URI nor the variables."""
    aws(moto_s3, None, None)
    for name, call in every_operation("s3://bucket/data", tmp_path).items():
        assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in complaint(call), name


def test_settings_that_make_no_client_are_said(aws: Any, moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a key, an endpoint without http://, a profile that does not exist: a traceback from inside botocore."""
    for endpoint, secret, profile in (("here:9000", "any", None), (moto_s3, None, None), (moto_s3, "any", "nobody")):
        aws(endpoint, "any", secret)
        if profile is not None:
            monkeypatch.setenv("AWS_PROFILE", profile)
        assert "check AWS_ENDPOINT_URL, AWS_PROFILE and the AWS keys" in complaint(lambda: storage.read("s3://b/a"))


def test_an_impossible_bucket_name_is_said_on_one_line(aws: Any, moto_s3: str) -> None:
    """The libraries explain errors over several lines; logs and jobs print one."""
    aws(moto_s3)
    assert "s3://B_K!/a" in complaint(lambda: storage.read("s3://B_K!/a"))


def test_a_file_in_the_way_of_a_folder_is_said(tmp_path: Path) -> None:
    """A traceback about `NotADirectoryError` from inside tempfile."""
    (tmp_path / "file").write_bytes(b"1")
    assert "file/below" in complaint(lambda: storage.write(str(tmp_path / "file" / "below"), b"1"))


def test_every_error_survives_the_way_between_processes() -> None:
    """Ray pickles errors: one with another constructor arrives as a TypeError about arguments."""
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.IgptError)]
    assert len(kinds) > 8
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("what to do")))
        assert (type(copy), str(copy)) == (kind, "what to do")


# ------------------------------------------------------------------------------------------------ servers that fail


class Faulty(http.server.BaseHTTPRequestHandler):
    """Answers each request as the next of `faults` says: with a 503, with half a body, or (None left) in full."""

    body = b"0123456789" * 100
    faults: list[str]
    requests: int

    def do_GET(self) -> None:
        type(self).requests += 1
        fault = self.faults.pop(0) if self.faults else ""
        self.send_response(503 if fault == "503" else 200)
        self.send_header("Content-Length", str(len(self.body) if fault != "503" else 0))
        self.end_headers()
        if fault != "503":
            self.wfile.write(self.body[: len(self.body) // 2] if fault == "half" else self.body)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def faulty(aws: Any) -> Iterator[type[Faulty]]:
    handler = type("Handler", (Faulty,), {"faults": [], "requests": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    aws(f"http://127.0.0.1:{server.server_address[1]}")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("fault", ["503", "half"])
def test_a_read_outlives_a_server_that_fails_once(faulty: type[Faulty], fault: str) -> None:
    """A refused request, and an answer that is truncated in the middle."""
    faulty.faults = [fault]
    assert storage.read("s3://bucket/file") == Faulty.body
    assert faulty.requests == 2


def test_a_read_gives_up_after_so_many_attempts(faulty: type[Faulty], monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry without an end is a job that hangs."""
    monkeypatch.setattr(object_clients, "RETRIES", 3)
    faulty.faults = ["half"] * 10
    assert "s3://bucket/file" in complaint(lambda: storage.read("s3://bucket/file"))
    assert faulty.requests == 3
