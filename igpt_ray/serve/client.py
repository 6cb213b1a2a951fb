"""Client of an igpt_ray server, for jobs with `--endpoint`.

Requests are repeated with exponential backoff while the server is busy or unreachable. Any other error raises
`EndpointError`, or `ImageError` if it concerns the image. Redirects are not followed, so that the key is sent to one
host only.
"""

import base64
import http.client
import json
import random
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from igpt_ray.data.token_format import TokenFormat, Tokens
from igpt_ray.errors import EndpointError, ImageError

Nats = NDArray[np.float64]

PATIENCE_S = 600
"""Time for which requests to a busy or unreachable server are repeated."""
TIMEOUT_S = 400
"""Timeout of a request, longer than the server's own."""
RETRIED_STATUSES = (408, 429, 502, 503, 504)
MAX_IMAGES = 64
"""Images per request."""


class Client:
    def __init__(self, endpoint: str, key: str, model: str = ""):
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise EndpointError(f"--endpoint {endpoint}: expected http://host:port or https://host")
        self.endpoint = endpoint.rstrip("/")
        self.parts = parts
        self.key = key
        self.model = model

    def model_info(self) -> dict[str, Any]:
        """The server's description of the model. Raises `EndpointError` if it has no model of that name."""
        listed = self._call("GET", "/v1/models")["data"]
        matches = [one for one in listed if self.model in ("", one["id"])]
        if not matches:
            raise EndpointError(f"{self.endpoint} has no model {self.model!r}: {', '.join(x['id'] for x in listed)}")
        return dict(matches[0])

    def kind(self) -> TokenFormat:
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
        parts = (tokens[start : start + MAX_IMAGES].tolist() for start in range(0, len(tokens), MAX_IMAGES))
        answer = [self._call("POST", "/v1/score", {"tokens": part})["data"] for part in parts]
        return np.array([one["nats"] for part in answer for one in part])

    def score_file(self, data: bytes) -> float:
        """Nats of an encoded image. Raises `ImageError` if the server cannot read it."""
        return float(self._call("POST", "/v1/score", {"image": _base64(data)})["data"][0]["nats"])

    def complete(self, picture: bytes | Tokens, seeds: list[int], **words: Any) -> tuple[Tokens, Tokens]:
        """Tokens of the original (T,) and of its completions (n, T). Raises `ImageError` for an unreadable file."""
        what = {"image": _base64(picture)} if isinstance(picture, bytes) else {"tokens": picture.tolist()}
        body = {**what, **words, "n": len(seeds), "seed": seeds, "response_format": "tokens"}
        answer = self._call("POST", "/v1/completions", body)
        done = [one["tokens"] for one in answer["data"]]
        return np.array(answer["original"]["tokens"], np.uint16), np.array(done, np.uint16)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        deadline, pause = time.monotonic() + PATIENCE_S, 0.5
        while True:
            try:
                status, answer, after = self._once(method, path, body)
                if status == 200:
                    return answer
                reason = f"{status} {answer.get('error', {}).get('message', '')}"
                if status not in RETRIED_STATUSES:
                    wrong = ImageError if answer.get("error", {}).get("code") == "invalid_image" else EndpointError
                    raise wrong(f"{self.endpoint}{path}: {reason}")
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                reason, after = str(error) or type(error).__name__, 0.0
            if time.monotonic() > deadline:
                raise EndpointError(f"{self.endpoint}{path} does not answer: {reason}")
            time.sleep(max(after, pause) * random.uniform(0.75, 1.25))
            pause = min(2 * pause, 30)

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any], float]:
        """Status, JSON, and the seconds of Retry-After."""
        kind = http.client.HTTPSConnection if self.parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.parts.netloc.rpartition("@")[2], timeout=TIMEOUT_S)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps({**body, "model": self.model}).encode()
        try:
            connection.request(method, self.parts.path.rstrip("/") + path, data, headers)
            answer = connection.getresponse()
            after = answer.getheader("retry-after", "0")
            text = answer.read()
            if answer.status in RETRIED_STATUSES and "json" not in answer.getheader("content-type", ""):
                return answer.status, {}, 0.0  # the error page of a gateway
            return answer.status, json.loads(text), float(after) if after.isdecimal() else 0.0
        finally:
            connection.close()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
