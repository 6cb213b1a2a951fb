"""A proxy between a client and a real S3 server that injects faults on a seeded schedule.

with FaultProxy(upstream_port, ["503", None, "cut 300", "reset"]) as proxy: ...   # per request, then none
"""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
ANYTHING = ("503", "reset", "cut 0", "cut 100", "cut 300", "cut 900", "cut 5000", "lost", "drop")
"""Faults that do not wait for a timeout."""


def seeded(seed: int, n: int, share: float, kinds: Sequence[str] = ANYTHING) -> list[str | None]:
    """A schedule for n requests of which about `share` fail, never more than three in a row."""
    rng = random.Random(seed)
    plan: list[str | None] = []
    for _ in range(n):
        failing = rng.random() < share and plan[-3:].count(None) + 3 - len(plan[-3:]) > 0
        plan.append(rng.choice(kinds) if failing else None)
    return plan


class FaultProxy:
    """Forwards HTTP to 127.0.0.1:`upstream`, with a fault for each scheduled request:

    "503" and "reset" respond without forwarding; "drop" resets before reading the request's body; "cut n" forwards and
    closes after n bytes of the response; "stall n" stops sending there and leaves the connection open; "lost" forwards
    and drops the response; "hang" reads the request and never responds.
    """

    def __init__(self, upstream: int, schedule: Sequence[str | None]):
        self.upstream = upstream
        self.schedule = list(schedule)
        self.requests = 0
        self.faults = 0
        self.ended = asyncio.Event()

    def fail_next(self, schedule: Sequence[str | None]) -> None:
        """Restart the schedule with these faults for the next requests."""
        self.schedule, self.requests, self.faults = list(schedule), 0, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
            fault = self.schedule[self.requests] if self.requests < len(self.schedule) else None
            kind, _, limit = (fault or "").partition(" ")
            self.requests += 1
            self.faults += fault is not None
            head, body = (b"", b"") if kind == "drop" else await self._request(lines, reader, writer)
            if kind == "hang":
                await self.ended.wait()
            elif kind in ("reset", "lost", "drop"):
                if kind == "lost":
                    await self._forward(head, body, writer, limit=0)
                linger = struct.pack("ii", 1, 0)  # close with RST, as a dying server does
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            elif kind == "503":
                writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n" % len(SLOW_DOWN) + SLOW_DOWN)
                await writer.drain()
            else:
                await self._forward(head, body, writer, int(limit) if limit else None)
                if kind == "stall":
                    await self.ended.wait()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client disconnected
        finally:
            writer.close()

    async def _request(
        self, lines: list[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[bytes, bytes]:
        """Head and body of one request, asked to be the connection's last."""
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
    """Run the proxy during the block, and yield its endpoint."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(proxy.serve, "127.0.0.1", 0), loop).result()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(_end(proxy, server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(proxy: FaultProxy, server: asyncio.Server) -> None:
    """Stop listening, and let go of the connections that still hang."""
    server.close()
    proxy.ended.set()
    if hanging := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(hanging, timeout=5)
