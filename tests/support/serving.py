"""A served release without Ray: the API and a replica in this process, over real HTTP."""

import base64
import http.client
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import uvicorn
from conftest import free_port

from igpt_ray import weights
from igpt_ray.data import pixels
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat, Tokens
from igpt_ray.evaluate.heads import load_head
from igpt_ray.flows.serve.replica import Replica, heads_of
from igpt_ray.generate import engine
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.serve.api import ServedModel, application
from igpt_ray.serve.config import ServeConfig
from igpt_ray.serve.decoder_pool import DecoderPool
from igpt_ray.serve.middleware import Keys
from igpt_ray.serve.schemas import Reader

KEY = "a key that only its owner knows"


class Local:
    """A replica with the interface of a Ray Serve handle."""

    def __init__(self, replica: Replica):
        self.replica = replica

    def complete(self, request: engine.Request) -> AsyncIterator[tuple[int, Tokens]]:
        return self.replica.complete(request)

    async def call(self, what: str, *words: Any) -> Any:
        return await getattr(self.replica, what)(*words)


class Place(NamedTuple):
    """The address of a server, and its replica."""

    host: str
    port: int
    replica: Replica

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(self, path: str, body: Any = None, key: str | None = None, **headers: str) -> "Answer":
        return ask(self.host, self.port, path, body, key, **headers)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def code(self) -> str | None:
        return self.body["error"]["code"] if isinstance(self.body, dict) and "error" in self.body else None


def ask(host: str, port: int, path: str, body: Any = None, key: str | None = None, **headers: str) -> Answer:
    """GET without a body, POST with a body; bytes are sent unchanged."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    said = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection = http.client.HTTPConnection(host, port, timeout=60)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, data, said | names)
        answer = connection.getresponse()
        text = answer.read()
        kind = answer.getheader("content-type", "")
        return Answer(answer.status, dict(answer.getheaders()), json.loads(text) if "json" in kind else text)
    finally:
        connection.close()


def events(text: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events: (name, data)."""
    found = []
    for part in text.decode().split("\n\n")[:-1]:
        name, data = part.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@contextmanager
def serving(
    releases: dict[str, str],
    heads: dict[str, str] | None = None,
    keys: Keys | None = None,
    slots: int = 8,
    queue: int = 64,
    model: type[Local] = Local,
) -> Iterator[Place]:
    fitted = {name: load_head(uri) for name, uri in (heads or {}).items()}
    served, replicas, decoders = {}, [], DecoderPool(2)
    for name, uri in releases.items():
        about = weights.load_config(uri)
        mine = {head: (heads or {})[head] for head in heads_of(about, fitted) if head in fitted}
        replicas.append(Replica(name, uri, mine, slots))
        reader = Reader(about, Palette.load(f"{uri}/palette.npy"), decoders)
        served[name] = ServedModel(name, reader, heads_of(about, fitted), slots, model(replicas[-1]))
    port = free_port()
    options = uvicorn.Config(application(served, keys, queue), port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Place("127.0.0.1", port, replicas[0])
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        decoders.close()


def tiny_release(uri: str, seed: int = 0, n_px: int = 8, n_vocab: int = 16, **shape: Any) -> str:
    """A release of random weights and colours, the head too, so that logits differ."""
    palette = Palette(np.random.default_rng(7).uniform(-1, 1, (n_vocab, 3)).astype(np.float32))
    torch.manual_seed(seed)
    settings = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_px": n_px, "n_vocab": n_vocab} | shape
    model = ImageGPT(ModelConfig(**settings))
    torch.nn.init.normal_(model.wtet.weight, std=0.2)
    kind = TokenFormat(n_px=n_px, n_vocab=n_vocab, palette=palette.fingerprint, pipeline=pixels.FAST)
    about = weights.ReleaseConfig(
        format=weights.FORMAT, model=model.config, kind=kind, sha256="", classes=["cat", "dog"], trained={"steps": 0}
    )
    weights.save_release(uri, model.state_dict(), palette, about)
    return uri


def probe_head(folder: str, release: str, classes: list[str], layer: int = 1, precision: str = "float32") -> str:
    """Files as written by jobs/probe.py, with random weights."""
    about = weights.load_config(release)
    rng, C = np.random.default_rng(3), about.model.n_embd
    Path(folder).mkdir(parents=True, exist_ok=True)
    np.savez(
        Path(folder, "classifier.npz"),
        mean=rng.normal(size=C),
        deviation=np.ones(C),
        weight=rng.normal(size=(len(classes), C)),
        bias=rng.normal(size=len(classes)),
        layer=layer,
        pooling="mean",
        precision=precision,
        release=about.sha256,
        classes=np.array(classes),
    )
    return folder


def picture(seed: int = 0, n: int = 40) -> bytes:
    """A PNG file of n x n random pixels."""
    return pixels.png(np.random.default_rng(seed).integers(0, 256, (n, n, 3), np.uint8))


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ------------------------------------------------------------------------------------------------ on Ray Serve


class Client:
    """Client of an application on Ray Serve, which sends the key."""

    def __init__(self, port: int):
        self.port = port

    def ask(self, path: str, body: Any = None, **headers: str) -> Answer:
        return ask("127.0.0.1", self.port, path, body, KEY, **headers)

    def complete(self, **words: Any) -> Any:
        body = {"image": base64_of(picture()), "response_format": "tokens", **words}
        answer = self.ask("/v1/completions", body)
        assert answer.status == 200, answer
        return events(answer.body)[-1][1]["data"] if words.get("stream") else answer.body["data"]


@contextmanager
def on_ray(settings: ServeConfig) -> Iterator[Client]:
    import ray.serve

    from igpt_ray.flows.serve import build

    port = free_port()
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray.serve.run(build(settings), name="igpt")
    client = Client(port)
    until(lambda: client.ask("/readyz").status == 200, 120)
    yield client
    ray.serve.shutdown()


def processes(deployment: str) -> dict[str, int]:
    """Actor name -> process id of the replicas of a deployment."""
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
    return {actor.name: actor.pid for actor in actors if f"#{deployment}#" in (actor.name or "")}
