"""A server of ours, asked over HTTP: what jobs do with `--endpoint`.

A request that finds the server busy, away or a replica short is sent again, later and later; any other refusal is an
`EndpointError`, or an `ImageError` where it is about the picture. Redirects are not followed: a key goes to one place.
"""

import base64
import http.client
import json
import random
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from igpt_ray.data.token_store import TokenFormat, Tokens
from igpt_ray.errors import EndpointError, ImageError
from igpt_ray.evaluate.likelihood import Nats

PATIENCE_S = 600
"""For a server that is busy or away."""
TIMEOUT_S = 400
"""Of a request; more than the server's own."""
AGAIN = (408, 429, 502, 503, 504)
AT_ONCE = 64
"""Pictures of a request."""


class Client:
    def __init__(self, endpoint: str, key: str, model: str = ""):
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise EndpointError(f"--endpoint {endpoint}: expected http://host:port or https://host")
        self.endpoint = endpoint.rstrip("/")
        self.parts = parts
        self.key = key
        self.model = model

    def about(self) -> dict[str, Any]:
        """What the server says of the model. Raises `EndpointError` if it has none of that name."""
        listed = self._ask("GET", "/v1/models")["data"]
        found = [one for one in listed if self.model in ("", one["id"])]
        if not found:
            raise EndpointError(f"{self.endpoint} has no model {self.model!r}: {', '.join(x['id'] for x in listed)}")
        return dict(found[0])

    def kind(self) -> TokenFormat:
        """What its tokens mean."""
        about = self.about()
        return TokenFormat(
            n_px=about["n_px"], n_vocab=about["n_vocab"], palette=about["palette_sha256"], pipeline=about["pipeline"]
        )

    def score(self, tokens: Tokens) -> Nats:
        """(N, T) -> (N,)"""
        parts = (tokens[start : start + AT_ONCE].tolist() for start in range(0, len(tokens), AT_ONCE))
        said = [self._ask("POST", "/v1/score", {"tokens": part})["data"] for part in parts]
        return np.array([one["nats"] for part in said for one in part])

    def score_file(self, data: bytes) -> float:
        """Of an encoded picture. Raises `ImageError` if the server cannot read it."""
        return float(self._ask("POST", "/v1/score", {"image": _base64(data)})["data"][0]["nats"])

    def complete(self, picture: bytes | Tokens, seeds: list[int], **words: Any) -> tuple[Tokens, Tokens]:
        """(T,) what was to be finished, and (n, T) how it was. Raises `ImageError` for a file nobody can read."""
        what = {"image": _base64(picture)} if isinstance(picture, bytes) else {"tokens": picture.tolist()}
        asked = {**what, **words, "n": len(seeds), "seed": seeds, "response_format": "tokens"}
        said = self._ask("POST", "/v1/completions", asked)
        done = [one["tokens"] for one in said["data"]]
        return np.array(said["original"]["tokens"], np.uint16), np.array(done, np.uint16)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        deadline, pause = time.monotonic() + PATIENCE_S, 0.5
        while True:
            try:
                status, said, after = self._once(method, path, body)
                if status == 200:
                    return said
                reason = f"{status} {said.get('error', {}).get('message', '')}"
                if status not in AGAIN:
                    wrong = ImageError if said.get("error", {}).get("code") == "invalid_image" else EndpointError
                    raise wrong(f"{self.endpoint}{path}: {reason}")
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                reason, after = str(error) or type(error).__name__, 0.0
            if time.monotonic() > deadline:
                raise EndpointError(f"{self.endpoint}{path} does not answer: {reason}")
            time.sleep(max(after, pause) * random.uniform(0.75, 1.25))
            pause = min(2 * pause, 30)

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any], float]:
        """Status, JSON, and after how many seconds to come again."""
        kind = http.client.HTTPSConnection if self.parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.parts.netloc.rpartition("@")[2], timeout=TIMEOUT_S)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps({**body, "model": self.model}).encode()
        try:
            connection.request(method, self.parts.path.rstrip("/") + path, data, headers)
            answer = connection.getresponse()
            after = answer.getheader("retry-after", "0")
            text = answer.read()
            if answer.status in AGAIN and "json" not in answer.getheader("content-type", ""):
                return answer.status, {}, 0.0  # a gateway's own words
            return answer.status, json.loads(text), float(after) if after.isdecimal() else 0.0
        finally:
            connection.close()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
