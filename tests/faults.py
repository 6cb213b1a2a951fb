"""A proxy that misbehaves on a seeded schedule, to stand between a client and a real S3 server.

with FaultProxy(upstream_port, ["503", None, "cut", "reset"]) as proxy: ...   # per request, then none
"""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
CUT_AFTER = 300
"""Bytes of an answer that get through before it is cut: its head and a little more."""


def seeded(seed: int, n: int, share: float, kinds: Sequence[str] = ("503", "reset", "cut", "lost")) -> list[str | None]:
    """A schedule for n requests of which about `share` fail, never more than three in a row."""
    rng = random.Random(seed)
    plan: list[str | None] = []
    for _ in range(n):
        failing = rng.random() < share and plan[-3:].count(None) + 3 - len(plan[-3:]) > 0
        plan.append(rng.choice(kinds) if failing else None)
    return plan


class FaultProxy:
    """Forwards HTTP to 127.0.0.1:`upstream`, except where the schedule says otherwise:

    "503" and "reset" instead of forwarding; "cut" forwards and breaks off within the answer; "lost" forwards, and the
    answer never arrives; "hang" keeps the connection open without a word.
    """

    def __init__(self, upstream: int, schedule: Sequence[str | None]):
        self.upstream = upstream
        self.schedule = list(schedule)
        self.requests = 0
        self.faults = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head, body = await self._request(reader, writer)
            fault = self.schedule[self.requests] if self.requests < len(self.schedule) else None
            self.requests += 1
            self.faults += fault is not None
            if fault == "hang":
                await asyncio.sleep(3600)
            elif fault in ("reset", "lost"):
                if fault == "lost":
                    await self._forward(head, body, writer, limit=0)
                linger = struct.pack("ii", 1, 0)  # close with RST, as a dying server does
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            elif fault == "503":
                writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n" % len(SLOW_DOWN) + SLOW_DOWN)
                await writer.drain()
            else:
                await self._forward(head, body, writer, limit=CUT_AFTER if fault == "cut" else None)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[bytes, bytes]:
        """One request, asked to be the connection's last."""
        lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
        fields = {line.split(b":")[0].lower(): line.split(b":", 1)[1].strip() for line in lines[1:]}
        if b"expect" in fields:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
        kept = [line for line in lines if line.split(b":")[0].lower() not in (b"expect", b"connection")]
        return b"\r\n".join([*kept, b"Connection: close", b"", b""]), body

    async def _forward(self, head: bytes, body: bytes, writer: asyncio.StreamWriter, limit: int | None) -> None:
        server, sender = await asyncio.open_connection("127.0.0.1", self.upstream)
        sender.write(head + body)
        sent = 0
        while data := await server.read(1 << 16):
            if limit is not None:
                data = data[: limit - sent]
            writer.write(data)
            await writer.drain()
            sent += len(data)
            if limit is not None and sent >= limit:
                break
        sender.close()


@contextmanager
def running(proxy: FaultProxy) -> Iterator[str]:
    """The proxy's endpoint, for as long as the block lasts."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(proxy.serve, "127.0.0.1", 0), loop).result()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
