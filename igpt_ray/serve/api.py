"""The HTTP API.

    POST /v1/completions   n completions of an image; with "stream", row by row as server-sent events
    POST /v1/features      features of images
    POST /v1/classify      classes, by the head of a probe or of a fine-tuned release
    POST /v1/score         nats of images and of their pixels
    GET  /v1/models        the served models
    GET  /healthz          liveness;  GET /readyz  readiness of all models
    GET  /                 the page;  GET /docs and /openapi.json

Images are decoded in child processes (`decoder_pool.py`); replicas receive tokens only. Bodies are JSON or multipart
forms (`schemas.py`), which `middleware.py` checks first. The server never fetches a URL.
"""

import asyncio
import base64
import hashlib
import json
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from igpt_ray.data.token_format import Tokens
from igpt_ray.errors import ImageError, SettingError
from igpt_ray.generate import engine
from igpt_ray.serve.decoder_pool import Overloaded
from igpt_ray.serve.middleware import PUBLIC, APIError, Keys, RequestGuard, overloaded
from igpt_ray.serve.schemas import (
    MAX_PICTURES,
    MAX_SAMPLES,
    BaseRequest,
    ClassifyRequest,
    CompletionRequest,
    FeaturesRequest,
    Reader,
    ScoreRequest,
)

log = logging.getLogger(__name__)

REQUEST_SECONDS = 300
"""Time limit of an answer or of a whole stream."""
READY_SECONDS = 30
PAGE = Path(__file__).resolve().parent / "web" / "index.html"

A = TypeVar("A", bound=BaseRequest)


class Model(Protocol):
    """The replicas of a release, or one of them."""

    def complete(self, request: engine.Request) -> AsyncIterator[tuple[int, Tokens]]: ...

    def call(self, method: str, *arguments: Any) -> Awaitable[Any]: ...


class ServedModel:
    """A release that the API serves."""

    def __init__(self, name: str, reader: Reader, heads: dict[str, list[str]], slots: int, model: Model):
        self.name = name
        self.reader = reader
        self.heads = heads
        """Name -> classes."""
        self.slots = slots
        self.model = model

    def listing(self) -> dict[str, Any]:
        release = self.reader.release
        return {
            "id": self.name,
            "object": "model",
            "n_px": release.model.n_px,
            "n_vocab": release.model.n_vocab,
            "n_layer": release.model.n_layer,
            "n_embd": release.model.n_embd,
            "parameters": release.model.n_params,
            "max_n": min(self.slots, MAX_SAMPLES),
            "pipeline": release.kind.pipeline,
            "sha256": release.sha256,
            "palette_sha256": release.kind.palette,
            "heads": [{"id": name, "classes": classes} for name, classes in self.heads.items()],
            "palette": self.colours(),
        }

    def colours(self) -> list[str]:
        """#rrggbb of every token."""
        colours = self.reader.palette.decode(np.arange(self.reader.release.model.n_vocab))
        return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colours.tolist()]


# ------------------------------------------------------------------------------------------------ the application


def application(served: dict[str, ServedModel], keys: Keys | None, queue: int) -> FastAPI:
    """The application with all routes. `served` maps names to models; the first is the default."""
    app = FastAPI(title="igpt_ray", version="1", description="Image GPT over HTTP.", redoc_url=None)
    app.add_middleware(RequestGuard, keys=keys, queue=queue)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    for error in (APIError, ImageError, Overloaded, SettingError, ValidationError, TimeoutError):
        app.add_exception_handler(error, lambda _, error: api_error_of(error).response)
    app.openapi = lambda: _openapi(app, keys is not None)  # type: ignore[method-assign]
    page = PAGE.read_text()
    headers = {"content-security-policy": _policy(page), "referrer-policy": "no-referrer"}
    _add_model_routes(app, served)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/healthz", summary="Liveness")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Readiness: every model has generated a pixel", responses=_error_responses(503))
    async def readyz() -> dict[str, str]:
        try:
            async with asyncio.timeout(READY_SECONDS):
                await asyncio.gather(*(served_model.model.call("ready") for served_model in served.values()))
        except Exception as error:
            raise APIError(503, "not_ready", f"a model is not ready ({type(error).__name__})") from error
        return {"status": "ready"}

    @app.get("/v1/models", summary="The served models", responses=_error_responses(401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served_model.listing() for served_model in served.values()]}

    return app


def _add_model_routes(app: FastAPI, served: dict[str, ServedModel]) -> None:
    @app.post("/v1/completions", **_takes(CompletionRequest, stream=True))
    async def completions(request: Request) -> Response:
        body = await parsed(request, CompletionRequest)
        served_model = _model_of(served, body)
        if body.n > served_model.slots:
            raise SettingError(f"n is {body.n}, expected at most {served_model.slots} on this server")
        deadline = asyncio.get_running_loop().time() + REQUEST_SECONDS
        async with asyncio.timeout_at(deadline):
            answer = Completion(served_model, body, await served_model.reader.request(body))
            if body.stream:
                events, headers = answer.events(deadline), {"cache-control": "no-store"}
                return StreamingResponse(events, media_type="text/event-stream", headers=headers)
            async for _ in answer.rows():
                pass
        return JSONResponse(answer.to_json())

    @app.post("/v1/features", **_takes(FeaturesRequest))
    async def features(request: Request) -> Response:
        body = await parsed(request, FeaturesRequest)
        served_model = _model_of(served, body)
        n_layer = served_model.reader.release.model.n_layer
        layer = n_layer // 2 if body.layer is None else body.layer
        if layer > n_layer:
            raise SettingError(f"layer is {layer}, expected 0 to {n_layer}")
        results = await _call(served_model, body, "features", layer, body.pooling)
        data = [{"index": i, "features": row.tolist()} for i, row in enumerate(results[1])]
        return JSONResponse({"model": served_model.name, "layer": layer, "pooling": body.pooling, "data": data})

    @app.post("/v1/classify", **_takes(ClassifyRequest))
    async def classify(request: Request) -> Response:
        body = await parsed(request, ClassifyRequest)
        served_model = _model_of(served, body)
        head = body.head or next(iter(served_model.heads), "")
        if head not in served_model.heads:
            heads = ", ".join(served_model.heads) or "(none)"
            raise APIError(404, "head_not_found", f"{served_model.name} has the heads {heads}")
        results, classes = await _call(served_model, body, "classify", head), served_model.heads[head]
        data = [{"index": i, "classes": _likeliest(row, classes, body.top_k)} for i, row in enumerate(results[1])]
        return JSONResponse({"model": served_model.name, "head": head, "data": data})

    @app.post("/v1/score", **_takes(ScoreRequest))
    async def score(request: Request) -> Response:
        body = await parsed(request, ScoreRequest)
        served_model = _model_of(served, body)
        tokens, nats = await _call(served_model, body, "score")
        data = []
        for i, (image, by_pixel) in enumerate(zip(tokens, nats, strict=True)):
            total = float(by_pixel.sum())
            nats_per_pixel = total / len(by_pixel)
            entry = {"index": i, "nats": total, "nats_per_pixel": nats_per_pixel}
            entry["bits_per_pixel"] = nats_per_pixel / math.log(2)
            if body.per_pixel:
                entry |= {"nats_by_pixel": by_pixel.tolist(), "tokens": image.tolist()}
            data.append(entry)
        return JSONResponse({"model": served_model.name, "pixels": int(nats.size), "data": data})


def _model_of(served: dict[str, ServedModel], body: BaseRequest) -> ServedModel:
    if not body.model:
        return next(iter(served.values()))
    if body.model not in served:
        raise APIError(404, "model_not_found", f"no such model: this server has {', '.join(served)}")
    return served[body.model]


async def _call(served_model: ServedModel, body: BaseRequest, method: str, *arguments: Any) -> tuple[Tokens, Any]:
    """The images' tokens, and the model's answer."""
    async with asyncio.timeout(REQUEST_SECONDS):
        tokens = await served_model.reader.image_tokens(body)
        return tokens, await served_model.model.call(method, tokens, *arguments)


def _likeliest(row: Any, classes: list[str], k: int) -> list[dict[str, Any]]:
    order = (-row).argsort(kind="stable")[:k].tolist()
    return [{"class": classes[i], "index": i, "probability": float(row[i])} for i in order]


# ------------------------------------------------------------------------------------------------ completions


class Completion:
    """A completion request in progress, and its answer."""

    def __init__(self, served_model: ServedModel, body: CompletionRequest, engine_request: engine.Request):
        self.served_model = served_model
        self.body = body
        self.engine_request = engine_request
        self.n_px = served_model.reader.n_px
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.tokens = engine_request.tokens[None].repeat(body.n, axis=0)
        """(n, T): the original's tokens, replaced as they are generated."""

    async def rows(self) -> AsyncIterator[tuple[int, Tokens]]:
        generation = self.served_model.model.complete(self.engine_request)
        try:
            async for row, generated in generation:
                self.tokens[:, row * self.n_px : (row + 1) * self.n_px] = generated
                yield row, generated
        finally:
            await generation.aclose()  # type: ignore[attr-defined]

    async def events(self, deadline: float) -> AsyncIterator[bytes]:
        """Server-sent events: `started` with the original, a `row` for each finished row, and `completed` with the
        answer of a request without "stream"; or `error` as the last event, also at `deadline` of the event loop."""
        yield _event("started", {**self._head(), "n": self.body.n})
        rows, clock = self.rows(), asyncio.get_running_loop().time
        try:
            while True:
                try:
                    row, generated = await asyncio.wait_for(anext(rows), deadline - clock())
                except StopAsyncIteration:
                    break
                data = [{"index": i, **self._encoded(strip)} for i, strip in enumerate(generated)]
                yield _event("row", {"row": row, "data": data})
            yield _event("completed", self.to_json())
        except Exception as error:
            yield _event("error", api_error_of(error).body)
        finally:
            await rows.aclose()  # type: ignore[attr-defined]

    def to_json(self) -> dict[str, Any]:
        seeds = self.body.seeds
        data = [{"index": i, "seed": seeds[i], **self._encoded(x)} for i, x in enumerate(self.tokens)]
        generated = int((~self.engine_request.prompt_mask).sum()) * self.body.n
        return {**self._head(), "data": data, "usage": {"painted_pixels": generated}}

    def _head(self) -> dict[str, Any]:
        original = self._encoded(self.engine_request.tokens)
        return {
            "id": self.id,
            "created": self.created,
            "model": self.served_model.name,
            "n_px": self.n_px,
            "original": original,
        }

    def _encoded(self, tokens: NDArray[np.integer]) -> dict[str, Any]:
        return self.served_model.reader.encoded(tokens, self.body.response_format)


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


# ------------------------------------------------------------------------------------------------ bodies


async def parsed(request: Request, body: type[A]) -> A:
    """Parse JSON or a multipart form; the form has the fields of the JSON, with files instead of base64."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return body.model_validate(await _form(request))
    if kind != "application/json":
        raise APIError(415, "unsupported_media_type", "send application/json or multipart/form-data")
    return body.model_validate_json(await request.body())


async def _form(request: Request) -> dict[str, Any]:
    results: dict[str, Any] = {}
    async with request.form(max_files=MAX_PICTURES + 1, max_fields=32, max_part_size=1 << 20) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                text = base64.b64encode(await value.read()).decode()
                results[name] = [*results.get(name, []), text] if name == "image" else text
            else:
                results[name] = value
    return results


def _takes(body: type[BaseRequest], stream: bool = False) -> dict[str, Any]:
    """OpenAPI documentation of a route. FastAPI supports one body type per route, so `parsed` parses the body."""
    schema = body.model_json_schema()
    form = {**schema, "properties": {k: v for k, v in schema["properties"].items() if k != "tokens"}}
    file = {"type": "string", "format": "binary"}
    form["properties"] = form["properties"] | {"image": file} | ({"mask": file} if "mask" in form["properties"] else {})
    form["required"] = ["image"]
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    responses = {
        200: {"description": "The answer"},
        **_error_responses(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    }
    if stream:
        responses[200]["content"] = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    return {
        "summary": (body.__doc__ or "").strip(),
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": responses,
    }


def _error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    fields = {"type": "object", "properties": {name: {"type": "string"} for name in ("message", "type", "code")}}
    schema = {"type": "object", "properties": {"error": fields}, "required": ["error"]}
    return {s: {"description": "An error", "content": {"application/json": {"schema": schema}}} for s in statuses}


def _openapi(app: FastAPI, keyed: bool) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        if keyed:
            document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, routes in document["paths"].items():
                for route in routes.values():
                    route["security"] = [] if path in PUBLIC else [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


# ------------------------------------------------------------------------------------------------ errors


def api_error_of(error: Exception) -> APIError:
    """The error that the client receives. Internal errors are logged and not disclosed."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return APIError(422, "invalid_body", f"{where}: {first['msg']}" if where else first["msg"])
    if isinstance(error, ImageError):
        return APIError(400, "invalid_image", str(error))
    if isinstance(error, Overloaded):
        return overloaded(str(error))
    if isinstance(error, SettingError):
        return APIError(400, "invalid_setting", str(error))
    if isinstance(error, TimeoutError):
        return APIError(504, "timeout", f"the request took longer than {REQUEST_SECONDS} s")
    log.error("a request failed", exc_info=error)
    return APIError(500, "internal_error", "internal error; see the server's log")


async def _http_error(_: Request, error: Any) -> Response:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    refused = APIError(error.status_code, code, str(error.detail))
    refused.headers = dict(error.headers or {})
    return refused.response


async def _internal_error(_: Request, error: Exception) -> Response:
    return api_error_of(error).response


def _policy(page: str) -> str:
    """Content security policy: only the page's own scripts and styles, and this server."""

    def hashes(tag: str) -> str:
        parts: list[str] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(p.encode()).digest()).decode()}'" for p in parts)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')};"
        " img-src 'self' data: blob:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
