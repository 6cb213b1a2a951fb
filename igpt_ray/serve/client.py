"""HTTP client of an igpt_ray server, for jobs with `--endpoint`.

Requests are retried with exponential backoff while the server is busy or unreachable. Any other error raises
`EndpointError`, or `ImageError` if it concerns the image. Redirects are not followed, so that the key is sent to one
host only.
"""

import base64
import json
import time
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
import urllib3
from numpy.typing import NDArray

from igpt_ray.data.token_format import TokenFormat, Tokens
from igpt_ray.errors import EndpointError, ImageError

Nats = NDArray[np.float64]

PATIENCE_S = 600
"""Time for which a request to a busy or unreachable server is retried."""
TIMEOUT_S = 400
"""Timeout of a request, longer than the server's own."""
RETRIED_STATUSES = (408, 429, 502, 503, 504)
CONNECTIONS = 16
"""Idle connections that are kept for reuse."""
MAX_IMAGES = 64
"""Images per request."""


class RetryUntil(urllib3.Retry):
    """Retries until `deadline` (seconds of time.monotonic), not a number of times."""

    deadline = 0.0

    def new(self, **settings: Any) -> Self:
        retry = super().new(**settings)
        retry.deadline = self.deadline
        return retry

    def is_exhausted(self) -> bool:
        return time.monotonic() > self.deadline


class Client:
    """One model of a server; an empty `model` is the server's first. Threads may share a client."""

    def __init__(self, endpoint: str, key: str, model: str = ""):
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname or url.query:
            raise EndpointError(f"--endpoint {endpoint}: expected http://host:port or https://host")
        self.endpoint = endpoint.rstrip("/")
        self.model = model
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.http = urllib3.PoolManager(maxsize=CONNECTIONS, headers=headers, timeout=TIMEOUT_S)

    def model_info(self) -> dict[str, Any]:
        """The server's description of the model. Raises `EndpointError` if it has no model of that name."""
        models = {model["id"]: model for model in self._call("GET", "/v1/models")["data"]}
        name = self.model or next(iter(models))
        if name not in models:
            raise EndpointError(f"{self.endpoint} has no model {name!r}: it has {', '.join(models)}")
        return dict(models[name])

    def token_format(self) -> TokenFormat:
        """The format of the model's tokens."""
        model_info = self.model_info()
        return TokenFormat(
            n_px=model_info["n_px"],
            n_vocab=model_info["n_vocab"],
            palette=model_info["palette_sha256"],
            pipeline=model_info["pipeline"],
        )

    def score(self, tokens: Tokens) -> Nats:
        """Tokens (N, T) -> nats (N,)."""
        batches = (tokens[start : start + MAX_IMAGES].tolist() for start in range(0, len(tokens), MAX_IMAGES))
        answers = [self._call("POST", "/v1/score", {"tokens": batch}) for batch in batches]
        return np.array([image["nats"] for answer in answers for image in answer["data"]])

    def score_file(self, data: bytes) -> float:
        """Nats of an encoded image. Raises `ImageError` if the server cannot read it."""
        return float(self._call("POST", "/v1/score", {"image": _base64(data)})["data"][0]["nats"])

    def complete(self, picture: bytes | Tokens, seeds: list[int], **options: Any) -> tuple[Tokens, Tokens]:
        """Tokens of the original (T,) and of its completions (n, T). Raises `ImageError` for an unreadable file."""
        image = {"image": _base64(picture)} if isinstance(picture, bytes) else {"tokens": picture.tolist()}
        body = {**image, **options, "n": len(seeds), "seed": seeds, "response_format": "tokens"}
        answer = self._call("POST", "/v1/completions", body)
        completions = [completion["tokens"] for completion in answer["data"]]
        return np.array(answer["original"]["tokens"], np.uint16), np.array(completions, np.uint16)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        retry = RetryUntil(
            total=None,
            allowed_methods=None,  # POST too: a request changes nothing on the server
            status_forcelist=RETRIED_STATUSES,
            backoff_factor=0.5,
            backoff_max=30,
            backoff_jitter=0.5,
            raise_on_status=False,
        )
        retry.deadline = time.monotonic() + PATIENCE_S
        url = self.endpoint + path
        data = None if body is None else json.dumps({**body, "model": self.model})
        try:
            response = self.http.request(method, url, body=data, retries=retry, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise EndpointError(f"{url} does not answer: {getattr(error, 'reason', error)}") from error
        try:
            answer: dict[str, Any] = response.json()
            problem = answer.get("error", {})
        except (ValueError, AttributeError) as error:
            raise EndpointError(
                f"{url}: {response.status}, not the JSON of an igpt_ray server: check --endpoint"
            ) from error
        if response.status == 200:
            return answer
        wrong = ImageError if problem.get("code") == "invalid_image" else EndpointError
        raise wrong(f"{url}: {response.status} {problem.get('message', '')}")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
