"""A release over HTTP, with Ray Serve and FastAPI.

    POST /v1/completions   {image: base64, rows, n, temperature, top_k, seed} -> finished pictures
    POST /v1/score         {image: base64} -> its nats
    GET  /v1/models        what is served
    GET  /healthz          the process answers;  GET /readyz  the model does

`serve deploy` builds the application with `build` (see cluster/serve.yaml); jobs/serve.py runs it from a driver.
"""

import asyncio
import base64
import binascii
import logging
import socket
import time
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions
from ray.serve.handle import DeploymentHandle

from igpt_ray import config, images, sampling, weights
from igpt_ray.errors import IgptError, ImageError, SettingError
from igpt_ray.evaluate import Likelihood, image_nats

log = logging.getLogger(__name__)

MAX_IMAGE_BASE64 = 14_000_000
"""Characters: a file of about 10 MB."""
MAX_SAMPLES = 16
REQUEST_TIMEOUT_S = 300
QUEUE = 64
"""Requests waiting for a replica before the next is answered 429."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    image: Annotated[str, Field(max_length=MAX_IMAGE_BASE64)]
    """A JPEG, PNG or WebP file in base64."""


class CompletionRequest(Body):
    rows: Annotated[int, Field(ge=0)] | None = None
    """Rows of pixels that are given, from the top; half of them if left out."""
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Sample i of a request has seed + i."""


class ScoreRequest(Body):
    pass


# ------------------------------------------------------------------------------------------------ the model


class Painter:
    """What a replica holds: a release, and what can be asked of it. No Serve in here."""

    def __init__(self, release: str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights.check_next(weights.load_config(release), release)
        self.release = weights.load_release(release, device)
        self.uri = release

    def about(self) -> dict[str, Any]:
        about = self.release.config
        return {"id": self.uri, "model": about.model.model_dump(), **about.kind.model_dump()}

    def complete(self, request: CompletionRequest) -> dict[str, Any]:
        n_px = self.release.config.model.n_px
        rows = n_px // 2 if request.rows is None else request.rows
        if rows > n_px:
            raise SettingError(f"rows is {rows}; a picture has {n_px}")
        tokens = self._tokens(request.image)
        given = torch.from_numpy(tokens[:, : rows * n_px].astype(np.int64)).to(self.release.model.wpe.device)
        seeds = [request.seed + i for i in range(request.n)]
        done = sampling.complete(self.release.model, given, request.n, seeds, request.temperature, request.top_k)
        data = [{"b64_png": self._png(x), "tokens": x.tolist()} for x in done.cpu().numpy()]
        return {"created": int(time.time()), "rows": rows, "original": {"b64_png": self._png(tokens[0])}, "data": data}

    def score(self, request: ScoreRequest) -> dict[str, Any]:
        nats = image_nats(self.release.model, self._tokens(request.image), 1)
        report = Likelihood.of(nats, self.release.config.model.n_positions).report()
        return {"nats": float(nats[0]), **{k: report[k] for k in ("nats_per_token", "bits_per_pixel", "tokens")}}

    def _tokens(self, image: str) -> np.ndarray:
        """(1, T): the evaluation view of an encoded picture."""
        try:
            data = base64.b64decode(image, validate=True)
        except binascii.Error as error:
            raise ImageError(f"image is not base64: {error}") from error
        about = self.release.config
        rgb = images.centre_view(data, about.model.n_px, about.kind.pipeline)
        return self.release.palette.encode(rgb).reshape(1, -1)

    def _png(self, tokens: np.ndarray) -> str:
        n_px = self.release.config.model.n_px
        return base64.b64encode(images.png(self.release.palette.decode(tokens).reshape(n_px, n_px, 3))).decode()


class Model:
    """A replica. Sampling holds the processor for seconds, so it runs beside the event loop, one at a time."""

    def __init__(self, release: str):
        self.painter = Painter(release)
        self.turn = asyncio.Lock()

    async def ask(self, what: str, request: Body | None) -> dict[str, Any]:
        """Errors of the request come back as {"error": ...}: an exception would lose its type on the way."""
        if request is None:
            return self.painter.about()
        async with self.turn:
            try:
                return await asyncio.to_thread(getattr(self.painter, what), request)
            except IgptError as error:
                return {"error": {"message": str(error), "type": "invalid_request_error", "code": _code(error)}}


def _code(error: IgptError) -> str:
    return "invalid_image" if isinstance(error, ImageError) else "invalid_setting"


# ------------------------------------------------------------------------------------------------ HTTP

app = FastAPI(title="igpt_ray", version="1")


@app.exception_handler(RequestValidationError)
async def _refused(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    message = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return JSONResponse(
        {"error": {"message": message, "type": "invalid_request_error", "code": "invalid_body"}}, status_code=422
    )


@serve.ingress(app)
class Api:
    def __init__(self, model: DeploymentHandle):
        self.model = model

    @app.post("/v1/completions")
    async def completions(self, request: CompletionRequest) -> JSONResponse:
        return await self._answer("complete", request)

    @app.post("/v1/score")
    async def score(self, request: ScoreRequest) -> JSONResponse:
        return await self._answer("score", request)

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        return {"data": [await self.model.ask.remote("about", None)]}

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(self) -> dict[str, str]:
        await self.model.ask.remote("about", None)
        return {"status": "ready"}

    async def _answer(self, what: str, request: Body) -> JSONResponse:
        answer = await self.model.ask.remote(what, request)
        return JSONResponse(answer, status_code=400 if "error" in answer else 200)


def build(settings: config.Serve) -> serve.Application:
    """The application; `serve deploy` passes the `args` of its YAML, checked as settings."""
    model = serve.deployment(
        max_ongoing_requests=4,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )(Model)
    api = serve.deployment(
        max_ongoing_requests=QUEUE,
        max_queued_requests=QUEUE,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
        ray_actor_options={"num_cpus": 0},
    )(Api)
    return api.bind(model.bind(settings.release))


# ------------------------------------------------------------------------------------------------ the job


def run(settings: config.Serve) -> dict[str, Any]:
    """Serve until interrupted (Ctrl-C, SIGTERM, `ray job stop`)."""
    # Refuse here, not in a replica that Serve would start again and again.
    weights.check_next(weights.load_config(settings.release), settings.release)
    _check_port(settings.host, settings.port)
    serve.start(http_options=HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=REQUEST_TIMEOUT_S))
    started = time.time()
    try:
        serve.run(build(settings), name="igpt")
        address = f"http://{settings.host}:{settings.port}"
        log.info("serving %s at %s", settings.release, address)
        log.info("try: %s", curl_line(address, "PICTURE.png"))
        while True:
            time.sleep(1)
    except (KeyboardInterrupt, SystemExit):
        return {"served": settings.release, "seconds": round(time.time() - started, 1)}
    finally:
        serve.shutdown()


def curl_line(address: str, picture: str) -> str:
    """A line for the shell that has a picture finished twice."""
    body = """'{"n": 2, "image": "'$(base64 -w0 """ + picture + """)'"}'"""
    return f"curl -s {address}/v1/completions -H 'Content-Type: application/json' -d {body}"


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SettingError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose a free one with --port"
            ) from error
