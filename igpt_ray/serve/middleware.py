"""ASGI middleware: authentication, a limited queue, limits on size and duration of request bodies.

The checks run in this order, so that unauthenticated clients cannot occupy memory. Bytes of a body are counted as they
arrive. Errors are JSON, {"error": {"message", "type", "code"}}.
"""

import asyncio
import hashlib
import hmac
import os
import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from igpt_ray import storage
from igpt_ray.errors import SettingError
from igpt_ray.serve.config import is_loopback
from igpt_ray.serve.schemas import MAX_BODY

PUBLIC = ("/", "/healthz", "/readyz", "/docs", "/openapi.json")
"""Paths without authentication; they disclose nothing about models or images."""
MAX_HELD = 512 << 20
"""Limit of the bytes of all bodies in memory."""
BODY_SECONDS = 30
"""Time limit for the arrival of a whole body."""
RETRY_AFTER_S = 5
LINE = re.compile(r"([0-9a-f]{64})(?:\s+(\S.*))?")
TYPES = {401: "authentication_error", 403: "authentication_error", 429: "overloaded_error"}


class APIError(Exception):
    """An error that is sent to the client."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> dict[str, Any]:
        type = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": type, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class Keys:
    """The sha256 hashes of the keys. Keys are long and random, so the hashes need no salt."""

    def __init__(self, hashes: list[bytes]):
        self.hashes = hashes

    @classmethod
    def load(cls, where: str) -> "Keys":
        """Read the hashes from env:NAME or a file. Raises `SettingError` if a line is malformed or there is none."""
        name = where.removeprefix("env:")
        text = os.environ.get(name, "") if name != where else storage.read(storage.absolute(where)).decode()
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
        found = [LINE.fullmatch(line) for line in lines]
        if not found or not all(found):
            raise SettingError(
                f"--keys {where}: expected one line per key, `<sha256 in hex> <name>`, as"
                f" `printf %s $KEY | sha256sum` prints, got {'another line' if found else 'none'}"
            )
        return cls([bytes.fromhex(match[1]) for match in found if match])

    def accepts(self, key: str) -> bool:
        """Whether the key is valid, in constant time: all hashes are compared in full."""
        asked = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        return sum(hmac.compare_digest(asked, known) for known in self.hashes) > 0


class RequestGuard:
    def __init__(self, app: ASGIApp, keys: Keys | None, queue: int):
        """Without keys, only clients on this machine are accepted."""
        self.app = app
        self.keys = keys
        self.queue = queue
        self.busy = 0
        self.held = 0
        """Bytes of the bodies of requests in progress."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _with_header(send, b"x-content-type-options", b"nosniff")
        try:
            self._authenticate(scope, Headers(scope=scope))
            with self._queue_slot(scope):
                body = await self._body(scope, receive)
                try:
                    await self._answer(scope, body, receive, send)
                finally:
                    self.held -= len(body)
        except APIError as error:
            await error.response(scope, receive, send)
        except _ClientDisconnected:
            pass

    def _authenticate(self, scope: Scope, headers: Headers) -> None:
        if self.keys is None:
            _check_local(scope, headers)
        elif scope["path"] not in PUBLIC:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            challenge = {"WWW_Authenticate": "Bearer"}
            if scheme.lower() != "bearer" or not key.strip():
                raise APIError(401, "missing_key", "send a key: Authorization: Bearer KEY", **challenge)
            if not self.keys.accepts(key.strip()):
                raise APIError(401, "wrong_key", "the key is not valid", **challenge)

    @contextmanager
    def _queue_slot(self, scope: Scope) -> Iterator[None]:
        """Count a request in the queue, except for reads. Raises `APIError` if the queue is full."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            yield
            return
        if self.busy >= self.queue:
            raise overloaded(f"{self.queue} requests are in progress")
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Read the body, counting its bytes, because a Content-Length may be wrong or missing."""
        too_large = APIError(413, "too_large", f"the body has more than {MAX_BODY} bytes", Connection="close")
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MAX_BODY:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientDisconnected
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self.held += len(parts[-1])
                    if size > MAX_BODY:
                        raise too_large
                    if self.held > MAX_HELD:
                        raise overloaded("the requests in progress are large")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except BaseException as error:
            self.held -= size
            if isinstance(error, TimeoutError):
                slow = f"the body took longer than {BODY_SECONDS:g} s"
                raise APIError(408, "slow_body", slow, Connection="close") from None
            raise

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application, and cancel it when the client disconnects."""
        disconnected, replayed = asyncio.Event(), False

        async def replay() -> Message:
            nonlocal replayed
            if not replayed:
                replayed = True
                return {"type": "http.request", "body": body, "more_body": False}
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def wait_for_disconnect() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            disconnected.set()

        answer = asyncio.ensure_future(self.app(scope, replay, send))
        watch = asyncio.ensure_future(wait_for_disconnect())
        try:
            await asyncio.wait((answer, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not answer.done():
                answer.cancel()
            with suppress(asyncio.CancelledError):
                await answer


def overloaded(why: str) -> APIError:
    return APIError(429, "overloaded", f"{why}: try again", Retry_After=str(RETRY_AFTER_S))


class _ClientDisconnected(Exception):
    """The client has disconnected."""


def _check_local(scope: Scope, headers: Headers) -> None:
    """Accept only clients on this machine, and no page of another site: such a page can send requests to this server,
    or resolve its own name to it."""
    client = scope.get("client")
    if client is None or not is_loopback(client[0]):
        raise APIError(401, "missing_key", "this server has no keys and accepts only clients on its own machine")
    host, origin = headers.get("host", ""), headers.get("origin")
    if not is_loopback(urlsplit(f"//{host}").hostname or ""):
        raise APIError(403, "foreign_host", "use the host name localhost, or start the server with --keys")
    if origin is not None and urlsplit(origin).netloc != host:
        raise APIError(403, "foreign_origin", "pages of other sites cannot use this server")


def _with_header(send: Send, name: bytes, value: bytes) -> Send:
    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (name, value)]
        await send(message)

    return sent
