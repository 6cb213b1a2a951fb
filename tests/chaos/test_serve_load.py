"""The application under load: replicas killed and deployed anew, and far more requests than it can take.

IGPT_LOAD_SECONDS=600 makes the mixed load ten minutes long.
"""

import collections
import hashlib
import json
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import KEY, Client, ask, base64_of, events, on_ray, picture, processes, tiny_release, until

from igpt_ray.flows.serve import build
from igpt_ray.serve.config import ServeConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

SECONDS = int(os.environ.get("IGPT_LOAD_SECONDS", "60"))
CLIENTS = 6


@pytest.fixture
def settings(tmp_path: Path) -> ServeConfig:
    (tmp_path / "keys").write_text(f"{hashlib.sha256(KEY.encode()).hexdigest()} a test\n")
    release = tiny_release(str(tmp_path / "release"), n_px=16)
    return ServeConfig(release=f"slow={release}", keys=str(tmp_path / "keys"), replicas=2, slots=4, queue=8, cpus=0.5)


def in_use() -> int:
    """Slots, the most that any replica has."""
    from ray import serve

    handle = serve.get_deployment_handle("release-slow", "igpt")
    return max(handle.slots.remote().result()[0] for _ in range(8))


def hang_up(client: Client, body: dict[str, Any]) -> None:
    data = json.dumps({**body, "stream": True, "rows": 0}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {KEY}\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as s:
        s.sendall(head.encode() + data)
        s.recv(300)


class Crowd:
    """Clients that ask this and that, and compare every answer with what was said before the storm."""

    def __init__(self, client: Client):
        self.client = client
        image = [base64_of(picture(i)) for i in range(3)]
        form = {"response_format": "tokens", "n": 2}
        self.bodies = [("/v1/completions", {"image": image[i], "rows": 8 + 2 * i, "seed": i, **form}) for i in range(3)]
        self.bodies += [("/v1/completions", {**body, "stream": True}) for _, body in self.bodies]
        self.bodies += [("/v1/score", {"image": image}), ("/v1/features", {"image": image[0]})]
        self.expected = [self.said(client.ask(*body)) for body in self.bodies]
        self.seen: collections.Counter[str] = collections.Counter()
        self.over = threading.Event()

    def said(self, answer: Any) -> Any:
        assert answer.status == 200, answer
        if isinstance(answer.body, bytes):
            name, data = events(answer.body)[-1]
            return data["data"] if name == "completed" else name
        return answer.body["data"]

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.over.is_set():
            which = rng.randrange(len(self.bodies) + 1)
            try:
                if which == len(self.bodies):
                    hang_up(self.client, self.bodies[0][1])
                    self.seen["hung up"] += 1
                    continue
                answer = self.client.ask(*self.bodies[which])
                if answer.status == 200:
                    self.seen["right" if same(self.said(answer), self.expected[which]) else "WRONG"] += 1
                else:
                    self.seen[f"{answer.status} {answer.code}"] += 1
            except (OSError, ValueError) as error:
                self.seen[type(error).__name__] += 1


def same(a: Any, b: Any) -> bool:
    """Tokens equal, floats up to rounding: a batch may be split otherwise."""
    if isinstance(b, float):
        return bool(a == pytest.approx(b, rel=1e-5, abs=1e-6))
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in b)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(b, list) else bool(a == b)


def test_mixed_load_with_a_killed_replica_and_a_redeployment(cluster: str, settings: ServeConfig) -> None:
    """Every answer is right, few requests fail, no slot is lost, memory stays."""
    import ray.serve

    with on_ray(settings) as client:
        crowd = Crowd(client)
        threads = [threading.Thread(target=crowd.run, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS / 4)
        os.kill(next(iter(processes("release-slow").values())), signal.SIGKILL)
        time.sleep(SECONDS / 4)
        ray.serve.run(build(settings.model_copy(update={"cpus": 0.4})), name="igpt")
        time.sleep(SECONDS / 8)
        watched = [psutil.Process(pid) for name in ("release-slow", "api") for pid in processes(name).values()]
        before = [process.memory_info().rss for process in watched]
        time.sleep(3 * SECONDS / 8)
        after = [process.memory_info().rss for process in watched]
        crowd.over.set()
        for thread in threads:
            thread.join(120)
        print(dict(crowd.seen), [(b >> 20, a >> 20) for b, a in zip(before, after, strict=True)])
        assert crowd.seen["WRONG"] == 0
        assert crowd.seen["right"] > SECONDS / 2
        failed = sum(n for what, n in crowd.seen.items() if what not in ("right", "hung up", "429 overloaded"))
        assert failed <= 2 * CLIENTS, crowd.seen
        assert all(a < 1.15 * b + (20 << 20) for b, a in zip(before, after, strict=True))
        until(lambda: in_use() == 0, 30)
        assert all(same(crowd.said(client.ask(*body)), x) for body, x in zip(crowd.bodies, crowd.expected, strict=True))


def test_ten_thousand_excess_requests_are_refused_and_the_server_recovers(cluster: str, settings: ServeConfig) -> None:
    with on_ray(settings) as client:
        body = {"image": base64_of(picture()), "rows": 0, "n": 4, "response_format": "tokens"}
        expected = client.ask("/v1/completions", body).body["data"]
        seen: collections.Counter[str] = collections.Counter()
        left, lock = iter(range(10_000)), threading.Lock()

        def storm() -> None:
            while True:
                with lock:
                    if next(left, None) is None:
                        return
                try:
                    answer = ask("127.0.0.1", client.port, "/v1/completions", body, KEY)
                    right = answer.status != 200 or answer.body["data"] == expected
                    seen[f"{answer.status} {answer.code}" if right else "WRONG"] += 1
                except OSError as error:
                    seen[type(error).__name__] += 1

        pids = processes("release-slow") | processes("api")
        threads = [threading.Thread(target=storm) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        started = time.monotonic()
        assert client.ask("/v1/completions", body).body["data"] == expected
        print(dict(seen), "first answer after", time.monotonic() - started)
        assert time.monotonic() - started < 30
        assert set(seen) == {"200 None", "429 overloaded"}
        assert sum(seen.values()) == 10_000
        assert processes("release-slow") | processes("api") == pids
        until(lambda: in_use() == 0, 30)
