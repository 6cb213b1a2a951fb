"""Decode the images of requests in processes of their own, so that an image cannot harm the server or other requests.

A request waits for one image at a time. Its next image is queued behind those of the other requests, so that a request
with many images delays another one by one image only. One process is reserved for small images, and large ones have a
queue of their own.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt_ray.data.decoding import Decoded, DecoderProcess, sizes
from igpt_ray.errors import ImageError

MAX_PIXELS, MAX_SIDE = 1 << 24, 1 << 14
"""Largest image. The limits of data preparation are higher, because its input is not public."""
MAX_SUM = 1 << 26
"""Most pixels of all images of a request."""
SMALL = 1 << 20
"""Most pixels of a small image."""
MAX_WAITING = 1 << 27
"""Most pixels of the largest images of all requests whose largest image is not small: seconds of work of a process."""
SECONDS = 20.0
"""Time limit of an image."""
MEMORY = 1 << 30
"""Memory that decoding an image may take, in bytes."""
CALLS = 100
"""Calls of a fork of a decoder process."""


class Overloaded(Exception):
    """Too many pixels wait to be decoded."""


class DecoderPool:
    def __init__(self, n: int):
        """Start `n` processes."""
        self._small = ThreadPoolExecutor(n, thread_name_prefix="decode")
        self._large = ThreadPoolExecutor(max(1, n - 1), thread_name_prefix="decode-large")
        self._idle: SimpleQueue[DecoderProcess] = SimpleQueue()
        for _ in range(n):
            self._idle.put(DecoderProcess(SECONDS, MEMORY, CALLS))
        self.waiting = 0
        """Pixels of the largest images of all requests whose largest image is not small."""

    async def decode(self, files: Sequence[bytes], function: Callable[..., Decoded], *arguments: Any) -> Decoded:
        """`function(file, *arguments)` of every file, stacked.

        Raises `ImageError` if a file cannot be decoded or exceeds a limit, and `Overloaded` if too many pixels wait.
        Cancelling the call removes its images from the queue; one that is being decoded is completed.
        """
        pixels = _checked(await self._run(self._small, sizes, list(files)))
        with self._admitted(max(pixels)):
            queues = [self._small if n <= SMALL else self._large for n in pixels]
            calls = zip(queues, files, strict=True)
            return np.stack([await self._run(queue, function, file, *arguments) for queue, file in calls])

    @contextmanager
    def _admitted(self, pixels: int) -> Iterator[None]:
        if pixels <= SMALL:
            yield
            return
        if self.waiting + pixels > MAX_WAITING:
            raise Overloaded("other large images are being decoded")
        self.waiting += pixels
        try:
            yield
        finally:
            self.waiting -= pixels

    async def _run(self, queue: Executor, function: Callable[..., Any], *arguments: Any) -> NDArray[Any]:
        return await asyncio.get_running_loop().run_in_executor(queue, self._call, function, *arguments)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> NDArray[Any]:
        process = self._idle.get()
        try:
            return process.call(function, *arguments)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        for threads in (self._small, self._large):
            threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()


def _checked(sizes: NDArray[np.int64]) -> list[int]:
    """The number of pixels of each image, from (N, 2) widths and heights. Raises `ImageError` above a limit."""
    for width, height in sizes.tolist():
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ImageError(
                f"the image has {width} x {height} pixels, expected at most {MAX_PIXELS} pixels and {MAX_SIDE} per side"
            )
    pixels: list[int] = sizes.prod(1).tolist()
    if sum(pixels) > MAX_SUM:
        raise ImageError(
            f"the {len(pixels)} images have {sum(pixels)} pixels, expected at most {MAX_SUM} in a request: send fewer"
            " images or smaller copies"
        )
    return pixels
