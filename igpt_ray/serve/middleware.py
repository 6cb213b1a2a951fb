"""What stands before the API: who may ask, how much at once, how large and how slow a request may be.

An ASGI middleware, in this order: the key, by its hash; room in the queue; the body, counted as it comes. So nobody
without a key makes the server hold a body, and nobody at all one that is too large. Every refusal is JSON,
{"error": {"message", "type", "code"}}.
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
"""Answered without a key: they say nothing about models or pictures."""
MAX_HELD = 512 << 20
"""Bytes of all bodies at once."""
BODY_SECONDS = 30
"""For all of a body to arrive."""
RETRY_AFTER_S = 5
LINE = re.compile(r"([0-9a-f]{64})(?:\s+(\S.*))?")
TYPES = {401: "authentication_error", 403: "authentication_error", 429: "overloaded_error"}


class APIError(Exception):
    """A request that gets an error for an answer."""

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
    """The sha256 of every key. Keys are random and long, so that their hashes need no salt."""

    def __init__(self, hashes: list[bytes]):
        self.hashes = hashes

    @classmethod
    def load(cls, where: str) -> "Keys":
        """From env:NAME or a file. Raises `SettingError` if that has none, or something else."""
        name = where.removeprefix("env:")
        text = os.environ.get(name, "") if name != where else storage.read(storage.absolute(where)).decode()
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
        found = [LINE.fullmatch(line) for line in lines]
        if not found or not all(found):
            raise SettingError(
                f"--keys {where}: expected a line for each key, `<its sha256 in hex> <a name>`, as"
                f" `printf %s $KEY | sha256sum` prints, got {'another line' if found else 'none'}"
            )
        return cls([bytes.fromhex(match[1]) for match in found if match])

    def know(self, key: str) -> bool:
        """In a time that tells nothing: every hash is compared, whole."""
        asked = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        return sum(hmac.compare_digest(asked, known) for known in self.hashes) > 0


class Gate:
    def __init__(self, app: ASGIApp, keys: Keys | None, queue: int):
        """Without keys, anybody on this machine is let in, and nobody else."""
        self.app = app
        self.keys = keys
        self.queue = queue
        self.busy = 0
        self.held = 0
        """Bytes of bodies whose requests are at work."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _with_header(send, b"x-content-type-options", b"nosniff")
        try:
            self._check_who(scope, Headers(scope=scope))
            with self._room(scope):
                body = await self._body(scope, receive)
                try:
                    await self._answer(scope, body, receive, send)
                finally:
                    self.held -= len(body)
        except APIError as refused:
            await refused.response(scope, receive, send)
        except _HungUp:
            pass

    def _check_who(self, scope: Scope, headers: Headers) -> None:
        if self.keys is None:
            _check_local(scope, headers)
        elif scope["path"] not in PUBLIC:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            challenge = {"WWW_Authenticate": "Bearer"}
            if scheme.lower() != "bearer" or not key.strip():
                raise APIError(401, "missing_key", "send a key: Authorization: Bearer KEY", **challenge)
            if not self.keys.know(key.strip()):
                raise APIError(401, "wrong_key", "this key is not one of ours", **challenge)

    @contextmanager
    def _room(self, scope: Scope) -> Iterator[None]:
        """Reading is free; work waits in a queue of limited length."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            yield
            return
        if self.busy >= self.queue:
            raise _overloaded(f"{self.queue} requests are at work")
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Counted as it comes: a Content-Length may lie, or be missing."""
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
                        raise _HungUp
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self.held += len(parts[-1])
                    if size > MAX_BODY:
                        raise too_large
                    if self.held > MAX_HELD:
                        raise _overloaded("the requests at work are large")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except BaseException as error:
            self.held -= size
            if isinstance(error, TimeoutError):
                slow = f"the body took longer than {BODY_SECONDS:g} s"
                raise APIError(408, "slow_body", slow, Connection="close") from None
            raise

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """The rest of the application, ended as soon as nobody listens any more."""
        gone, said = asyncio.Event(), False

        async def replay() -> Message:
            nonlocal said
            if not said:
                said = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def hung_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        answer = asyncio.ensure_future(self.app(scope, replay, send))
        watch = asyncio.ensure_future(hung_up())
        try:
            await asyncio.wait((answer, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not answer.done():
                answer.cancel()
            with suppress(asyncio.CancelledError):
                await answer


def _overloaded(why: str) -> APIError:
    return APIError(429, "overloaded", f"{why}: try again", Retry_After=str(RETRY_AFTER_S))


class _HungUp(Exception):
    """Nobody is there to be answered."""


def _check_local(scope: Scope, headers: Headers) -> None:
    """Open to this machine alone, and not to what its browsers load from elsewhere: a page of another site can send
    requests here, and can have its own name point here."""
    client = scope.get("client")
    if client is None or not is_loopback(client[0]):
        raise APIError(401, "missing_key", "this server asks for no key and so answers on its own machine alone")
    host, origin = headers.get("host", ""), headers.get("origin")
    if not is_loopback(urlsplit(f"//{host}").hostname or ""):
        raise APIError(403, "foreign_host", "ask for this server as localhost, or start it with --keys")
    if origin is not None and urlsplit(origin).netloc != host:
        raise APIError(403, "foreign_origin", "a page of another site cannot ask this server")


def _with_header(send: Send, name: bytes, value: bytes) -> Send:
    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (name, value)]
        await send(message)

    return sent
