"""Read-ahead that hides the latency of an object store, for many small files and for range requests on a large one."""

import bz2
import gzip
import io
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import pyarrow as pa

from igpt_ray import storage
from igpt_ray.data.sources.listing import LFS_POINTER
from igpt_ray.errors import SourceError

FIRST = 256 << 10
"""Bytes of the first request, and of the first request after a seek."""
LARGEST = 8 << 20
"""Request size doubles up to this limit during sequential reads. At most two blocks are in memory."""


class _Reader:
    """Reads parts of one file, listed with `size` bytes.

    Raises `SourceError` if its size is another one, or if it is replaced between two reads.
    """

    def __init__(self, uri: str, size: int):
        self.uri = uri
        self.size = size
        self._version: storage.Version | None = None

    def __call__(self, start: int, length: int) -> bytes:
        data, version = storage.read_versioned(self.uri, start, length)
        self._version = self._version or version
        if version[0] != self.size:
            raise SourceError(
                f"{self.uri} has changed since it was listed with {self.size} bytes: repeat the command when it is"
                " complete"
            )
        if version != self._version:
            raise SourceError(f"{self.uri} has changed while it was read: repeat the command when it is complete")
        return data


class _Prefetch(NamedTuple):
    start: int
    data: "Future[bytes]"


class Window:
    """Buffered reads of `uri`, optimised for forward reads.

    Seeks use small blocks without read-ahead. Sequential reads use growing blocks, and a thread fetches the next block
    while the current one is used, which hides the latency of an object store. Use it as a context manager.
    """

    def __init__(self, uri: str, size: int):
        self.uri = uri
        self.size = size
        self._fetch = _Reader(uri, size)
        self._start = size  # so that the first read counts as a seek
        self._block = b""
        self._request = FIRST
        self._prefetch: _Prefetch | None = None
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer at the end of the file."""
        stop = min(start + length, self.size)
        parts = []
        while start < stop:
            if not self._start <= start < self._start + len(self._block):
                self._move(start)
            part = self._block[start - self._start : stop - self._start]
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_all(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`. Raises `SourceError` if the file ends before."""
        data = self.read(start, length)
        if len(data) < length:
            raise SourceError(f"{self.uri} ends before byte {start + length}: it is damaged, or its index is")
        return data

    def finish(self) -> None:
        """Called at the end mark of an archive. A decompressed file is read to its end, where its checksum is."""

    def _move(self, start: int) -> None:
        """Load the block that contains `start`."""
        block_end = self._start + len(self._block)
        sequential = block_end <= start < block_end + self._request
        self._request = min(2 * self._request, LARGEST) if sequential else FIRST
        prefetch, self._prefetch = self._prefetch, None
        block = prefetch.data.result() if prefetch and sequential else b""
        if prefetch and prefetch.start <= start < prefetch.start + len(block):
            self._start, self._block = prefetch.start, block
        else:
            self._start, self._block = start, self._fetch(start, min(self._request, self.size - start))
        ahead = self._start + len(self._block)
        if sequential and self._block and ahead < self.size:
            length = min(self._request, self.size - ahead)
            self._prefetch = _Prefetch(ahead, self._thread.submit(self._fetch, ahead, length))


class RangeFile(io.RawIOBase):
    """A stored file as a seekable Python file that fetches only the bytes that are read."""

    def __init__(self, uri: str, size: int):
        self.uri = uri
        self.size = size
        self.position = 0
        self._fetch = _Reader(uri, size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        remaining = max(0, self.size - self.position)
        length = remaining if size is None or size < 0 else min(size, remaining)
        data = self._fetch(self.position, length) if length else b""
        self.position += len(data)
        return data

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class DecompressedWindow(Window):
    """Forward reads of the decompressed content of a file. Memory is one block of at most `LARGEST` bytes.

    The decompressed size is not known in advance: `size` is larger than any file, and reads end at the end of the file.
    """

    def __init__(self, uri: str, size: int, stream: Readable):
        super().__init__(uri, 1 << 62)
        self._stream = stream
        self._start = 0

    def finish(self) -> None:
        while self._block:
            self._move(self._start + len(self._block))

    def _move(self, start: int) -> None:
        try:
            position = self._start + len(self._block)
            if start < position:
                raise SourceError(f"{self.uri} is compressed and can only be read from its beginning")
            while position < start and (skipped := self._stream.read(min(start - position, FIRST))):
                position += len(skipped)
            self._start, self._block = start, self._stream.read(FIRST) if position == start else b""
        except (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            raise SourceError(f"{self.uri} is damaged or cut: {error or type(error).__name__}") from error


def _zstd(file: io.RawIOBase) -> Readable:
    return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")


COMPRESSED: dict[bytes, Callable[[io.RawIOBase], Readable]] = {
    b"\x1f\x8b\x08": lambda file: gzip.GzipFile(fileobj=io.BufferedReader(file, FIRST)),
    b"BZh": lambda file: bz2.BZ2File(io.BufferedReader(file, FIRST)),
    b"\xfd7zXZ\0": lambda file: lzma.LZMAFile(io.BufferedReader(file, FIRST)),  # noqa: SIM115
    b"\x28\xb5\x2f\xfd": _zstd,
}
"""Decompressors by the first bytes of a file."""


def archive_window(uri: str, size: int) -> Window:
    """A window on an archive, decompressed if its first bytes are those of gzip, bzip2, xz or Zstandard."""
    window = Window(uri, size)
    start = window.read(0, 6)
    for magic, opened in COMPRESSED.items():
        if start.startswith(magic):
            return DecompressedWindow(uri, size, opened(RangeFile(uri, size)))
    if start.startswith(LFS_POINTER[:6]) and window.read(0, len(LFS_POINTER)) == LFS_POINTER:
        raise SourceError(f"{uri} is a Git LFS pointer instead of the file: run `git lfs pull`")
    return window


T = TypeVar("T")
R = TypeVar("R")


def fetched(items: Iterable[T], fetch: Callable[[T], R], n: int) -> Iterator[R]:
    """`fetch(item)` of every item, in order, with n threads and at most n results ahead of the consumer."""
    pending: deque[Future[R]] = deque()
    threads = ThreadPoolExecutor(n)
    try:
        for item in items:
            pending.append(threads.submit(fetch, item))
            if len(pending) > n:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # a consumer that stops early does not wait


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, with the next one computed in a thread while the consumer uses the current one."""
    with ThreadPoolExecutor(1) as thread:
        prefetch = thread.submit(next, items, None)
        while (item := prefetch.result()) is not None:
            prefetch = thread.submit(next, items, None)
            yield item
