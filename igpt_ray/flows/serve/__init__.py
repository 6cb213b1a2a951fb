"""Releases over HTTP, with Ray Serve and FastAPI: an API deployment, and one deployment of replicas per release.

`serve deploy` builds the application with `build` (see cluster/serve.yaml); jobs/serve.py runs it from a driver.
"""

import itertools
import logging
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle

from igpt_ray import storage, weights
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_format import Tokens
from igpt_ray.errors import FeatureError, SettingError
from igpt_ray.evaluate.heads import load_head
from igpt_ray.flows.serve.check import API, check_file, deployment_of
from igpt_ray.flows.serve.replica import Replica, heads_of
from igpt_ray.generate import engine
from igpt_ray.serve.api import REQUEST_SECONDS, ServedModel, application
from igpt_ray.serve.config import ServeConfig
from igpt_ray.serve.decoder_pool import DecoderPool
from igpt_ray.serve.middleware import APIError, Keys
from igpt_ray.serve.schemas import Reader

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Attempts of a request whose replica dies. All replicas give the same answer."""
CONNECTIONS = 10_000
"""Concurrent requests of the API. Its middleware rejects requests above the queue in JSON; Ray's proxy would not."""


class Api:
    """The ingress deployment, which has no model."""

    def __init__(self, settings: ServeConfig, keys: Keys | None, handles: dict[str, DeploymentHandle]):
        self.settings, self.keys, self.handles = settings, keys, handles

    def __serve_build_asgi_app__(self) -> Any:
        heads = {name: load_head(uri) for name, uri in self.settings.probes.items()}
        served, decoders = {}, DecoderPool(self.settings.decoders)
        for name, uri in self.settings.releases.items():
            release = weights.load_config(uri)
            reader = Reader(release, Palette.load(storage.join(uri, "palette.npy")), decoders)
            replicas = Replicas(self.handles[name])
            served[name] = ServedModel(name, reader, heads_of(release, heads), self.settings.slots, replicas)
        return application(served, self.keys, self.settings.queue)


class Replicas:
    """The replicas of a release. A request whose replica dies is sent to another one."""

    def __init__(self, handle: DeploymentHandle):
        self.handle = handle

    async def call(self, method: str, *arguments: Any) -> Any:
        for attempt in itertools.count(1):
            try:
                return await getattr(self.handle, method).remote(*arguments)
            except RayActorError as error:
                _give_up_after(attempt, error)
        raise AssertionError

    async def complete(self, request: engine.Request) -> AsyncIterator[tuple[int, Tokens]]:
        """Yield each row once: another replica generates the same rows again, which are skipped."""
        n_yielded = 0
        for attempt in itertools.count(1):
            rows, n = self.handle.options(stream=True).complete.remote(request), 0
            try:
                async for row in rows:
                    n += 1
                    if n > n_yielded:
                        n_yielded = n
                        yield row
                return
            except RayActorError as error:
                _give_up_after(attempt, error)
            finally:
                rows.cancel()


def _give_up_after(attempt: int, error: RayActorError) -> None:
    log.warning("a replica was lost (attempt %d): %s", attempt, error)
    if attempt == ATTEMPTS:
        message = f"{ATTEMPTS} replicas died during this request: try again"
        raise APIError(503, "replica_lost", message, Retry_After="5") from error


def build(settings: ServeConfig) -> serve.Application:
    """The Serve application. `serve deploy` validates the `args` of its YAML as these settings and passes them.

    Raises `FeatureError` if a head was not fitted on any of the releases.
    """
    handles, probes = {}, settings.probes
    heads = {name: load_head(uri) for name, uri in probes.items()}
    unmatched = set(heads)
    for name, uri in settings.releases.items():
        release = weights.load_config(uri)
        weights.check_next(release, uri)
        heads_here = {head: probes[head] for head in heads_of(release, heads) if head in probes}
        unmatched -= heads_here.keys()
        deployment = serve.deployment(
            name=deployment_of(name),
            num_replicas=settings.replicas,
            max_ongoing_requests=settings.slots,
            ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
            graceful_shutdown_timeout_s=REQUEST_SECONDS,
            health_check_period_s=5,
        )(Replica)
        handles[name] = deployment.bind(name, uri, heads_here, settings.slots, settings.precision)
    if unmatched:
        raise FeatureError(f"the head {min(unmatched)} was not fitted on any of these releases: add its release")
    api = serve.deployment(
        name=API,
        max_ongoing_requests=CONNECTIONS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=REQUEST_SECONDS,
    )(serve.ingress()(Api))
    return api.bind(settings, Keys.load(settings.keys) if settings.keys else None, handles)


# ------------------------------------------------------------------------------------------------ the command


def run(settings: ServeConfig) -> dict[str, Any]:
    """Serve until interrupted (Ctrl-C, SIGTERM, `ray job stop`), or only check the file `settings.check`."""
    if settings.check:
        return check_file(settings.check)
    application = build(settings)  # validates here; Serve would restart a failing replica without end
    _check_port(settings.host, settings.port)
    options = HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=REQUEST_SECONDS + 60)
    serve.start(http_options=options)
    started = time.time()
    try:
        serve.run(application, name="igpt")
        address = f"http://{settings.host}:{settings.port}"
        log.info("serving %s, web page: %s/", ", ".join(settings.releases), address)
        log.info("example: %s", curl_line(address, "IMAGE.png", bool(settings.keys)))
        while True:
            time.sleep(1)
    except (KeyboardInterrupt, SystemExit):
        return {"served": settings.releases, "seconds": round(time.time() - started, 1)}
    finally:
        serve.shutdown()


def curl_line(address: str, image: str, keyed: bool = False) -> str:
    """A shell command that requests two completions of an image file."""
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    return f"curl -s {address}/v1/completions{key} -F n=2 -F image=@{image}"


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SettingError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose a free port with --port"
            ) from error
