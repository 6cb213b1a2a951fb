"""Reading ahead, to hide an object store's latency: of many small files, and of one large one by range requests."""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from igpt_ray import storage
from igpt_ray.errors import SourceError

FIRST = 256 << 10
"""Bytes of the first request, and of the first after a jump."""
LARGEST = 8 << 20
"""Requests double up to here while the reader goes straight on. Two of them are held at most."""


class _Coming(NamedTuple):
    start: int
    data: "Future[bytes]"


class Window:
    """Reads of `uri`, cheap if they go forward: what lies between them is fetched in blocks, one block ahead.

    A reader who skips gets small blocks and nothing ahead; one who goes straight on soon gets large ones, fetched by
    a thread while the last is used, which hides an object store's latency. Use it as a context manager.
    """

    def __init__(self, uri: str, size: int):
        self.uri = uri
        self.size = size
        self._start = size  # nowhere near the first read, which is a jump
        self._block = b""
        self._request = FIRST
        self._coming: _Coming | None = None
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
            if not part:
                break  # shorter than its listing said: the caller sees a short answer
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_all(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, or `SourceError`."""
        data = self.read(start, length)
        if len(data) < length:
            raise SourceError(f"{self.uri} has changed since it was listed: it ends before byte {start + length}")
        return data

    def _move(self, start: int) -> None:
        """Make the block that holds `start` the current one."""
        behind = self._start + len(self._block)
        straight = behind <= start < behind + self._request
        self._request = min(2 * self._request, LARGEST) if straight else FIRST
        coming, self._coming = self._coming, None
        block = coming.data.result() if coming and straight else b""
        if coming and coming.start <= start < coming.start + len(block):
            self._start, self._block = coming.start, block
        else:
            self._start, self._block = start, storage.read(self.uri, start, min(self._request, self.size - start))
        ahead = self._start + len(self._block)
        if straight and self._block and ahead < self.size:
            length = min(self._request, self.size - ahead)
            self._coming = _Coming(ahead, self._thread.submit(storage.read, self.uri, ahead, length))


class RangeFile(io.RawIOBase):
    """A stored file as a seekable Python file that fetches what is read, and nothing else."""

    def __init__(self, uri: str, size: int):
        self.uri = uri
        self.size = size
        self.position = 0

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
        left = max(0, self.size - self.position)
        length = left if size is None or size < 0 else min(size, left)
        data = storage.read(self.uri, self.position, length) if length else b""
        self.position += len(data)
        return data


T = TypeVar("T")
R = TypeVar("R")


def fetched(items: Iterable[T], fetch: Callable[[T], R], n: int) -> Iterator[R]:
    """`fetch(item)` of every item, in order, by n threads that are never more than n results ahead."""
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
        threads.shutdown(wait=False, cancel_futures=True)  # whoever stops half-way does not wait for the rest


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made by a thread while the one before is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
