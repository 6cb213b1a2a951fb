"""The application on Ray Serve: replicas that die, clients that hang up, files that are misspelt."""

import copy
import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import (
    KEY,
    Client,
    ask,
    base64_of,
    free_port,
    on_ray,
    picture,
    probe_head,
    processes,
    serving,
    tiny_release,
    until,
)

from igpt_ray.errors import CheckpointError, FeatureError, SettingError
from igpt_ray.flows import serve
from igpt_ray.flows.serve import check
from igpt_ray.serve.config import ServeConfig

pytestmark = pytest.mark.ray

SLOTS = 4
CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
PICTURE = base64_of(picture())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{hashlib.sha256(KEY.encode()).hexdigest()} a test\n")
    return str(path)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Large enough that a whole picture takes a second or two."""
    return tiny_release(str(tmp_path_factory.mktemp("slow")), n_px=16, n_layer=4, n_embd=128)


@pytest.fixture(scope="module")
def settings(release: str, keys: str) -> ServeConfig:
    return ServeConfig(release=f"slow={release}", keys=keys, replicas=2, slots=SLOTS, queue=64)


@pytest.fixture(scope="module")
def client(cluster: str, settings: ServeConfig) -> Iterator[Client]:
    with on_ray(settings) as client:
        yield client


def test_completions_do_not_depend_on_replicas_or_load(client: Client, release: str) -> None:
    """The tokens of a request are the same alone without Ray, among 31 others on two replicas, and streamed."""
    body = {"image": PICTURE, "response_format": "tokens", "n": 2, "rows": 12, "seed": 5}
    with serving({"slow": release}, slots=2) as place:
        alone = place.ask("/v1/completions", body).body["data"]

    def other(i: int) -> int:
        words = {"image": base64_of(picture(i)), "rows": 13 + i % 3, "n": 1 + i % SLOTS, "seed": i}
        return client.ask("/v1/completions", words | {"stream": bool(i % 2)}).status

    with ThreadPoolExecutor(36) as pool:
        others = [pool.submit(other, i) for i in range(31)]
        mine = [pool.submit(client.complete, n=2, rows=12, seed=5, stream=bool(i % 2)) for i in range(4)]
        assert {done.result() for done in others} == {200}
        assert all(done.result() == alone for done in mine)
    assert client.complete(n=2, rows=12, seed=5) == alone


def test_a_stream_arrives_row_by_row(client: Client) -> None:
    """Rows arrive while the picture is being painted, not at its end."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    body = json.dumps({"image": PICTURE, "rows": 0, "stream": True}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/completions", body, headers)
    answer, times = connection.getresponse(), []
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    while line := answer.readline():
        if line == b"event: row\n":
            times.append(time.monotonic())
    connection.close()
    assert len(times) == 16
    assert len({round(t, 2) for t in times}) > 8


def test_a_client_that_disconnects_frees_its_slots(client: Client) -> None:
    body = json.dumps({"image": PICTURE, "rows": 0, "n": SLOTS, "stream": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    from ray import serve as ray_serve

    handle = ray_serve.get_deployment_handle("release-slow", "igpt")

    def in_use() -> int:
        return max(handle.slots.remote().result()[0] for _ in range(6))

    with socket.create_connection(("127.0.0.1", client.port)) as s:
        s.sendall(head.encode() + body)
        until(lambda: in_use() == SLOTS)
    started = time.monotonic()
    until(lambda: in_use() == 0, 5)
    assert time.monotonic() - started < 3


def test_requests_survive_the_death_of_a_replica(client: Client) -> None:
    """Streams go on where they were: another replica paints the same."""
    words = {"rows": 0, "n": 2, "seed": 3}
    expected = client.complete(**words)
    before = processes("release-slow")
    assert len(before) == 2
    with ThreadPoolExecutor(4) as pool:
        mine = [pool.submit(client.complete, **words, stream=bool(i % 2)) for i in range(4)]
        time.sleep(0.5)
        os.kill(next(iter(before.values())), signal.SIGKILL)
        assert all(done.result() == expected for done in mine)
    until(lambda: len(processes("release-slow")) == 2, 60)


def test_errors_behind_ray_s_proxy_are_json(client: Client) -> None:
    assert client.ask("/nothing").code == "not_found"
    assert client.ask("/v1/completions").code == "method_not_allowed"
    assert client.ask("/v1/completions", {"image": "x"}).code == "invalid_image"
    assert client.ask("/v1/completions", {"image": PICTURE, "model": "../../x"}).code == "model_not_found"
    assert ask("127.0.0.1", client.port, "/v1/models").code == "missing_key"
    assert ask("127.0.0.1", client.port, "/v1/models", key="wrong").code == "wrong_key"
    assert client.ask("/v1/score", b"{}", Content_Length=str(17 << 20)).code == "too_large"
    assert client.ask("/v1/score", {"image": PICTURE}).status == 200


def test_an_image_that_ends_its_decoder_is_an_error_and_the_next_request_is_answered(client: Client) -> None:
    """Its fault is real: see `tests/support/sitecustomize.py`."""
    answer = client.ask("/v1/score", {"image": base64_of(picture() + b"TEST-CRASH")})
    assert (answer.status, answer.code) == (400, "invalid_image")
    assert answer.body["error"]["message"] == "the decoder crashes"
    assert client.ask("/v1/score", {"image": base64_of(picture())}).status == 200


def test_metrics_are_exported_where_prometheus_scrapes(client: Client) -> None:
    import urllib.request

    import ray

    client.complete(rows=15)

    def found() -> str:
        pages = []
        for node in ray.nodes():
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            pages.append(urllib.request.urlopen(url, timeout=10).read().decode())
        return "\n".join(pages)

    names = ("igpt_slots_in_use", "igpt_requests_waiting", "igpt_pixels_generated", "igpt_first_row_seconds")
    until(lambda: all(name in found() for name in names), 40)


# ------------------------------------------------------------------------------------------------ before it serves


def test_invalid_releases_are_refused_before_the_server_starts(release: str, keys: str, tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(SettingError, match=f"cannot listen on 127.0.0.1:{port} .*--port"):
            serve.run(ServeConfig(release=release, port=port, open=True))
    with pytest.raises(CheckpointError, match="no release at"):
        serve.run(ServeConfig(release=str(tmp_path / "none"), open=True))
    with pytest.raises(SettingError, match="expected one line per key"):
        serve.run(ServeConfig(release=release, keys="env:IGPT_NO_SUCH_KEYS"))
    head = f"pets={probe_head(str(tmp_path / 'pets'), release, ['cat', 'dog'])}"
    other = tiny_release(str(tmp_path / "other"), seed=1)
    assert serve.build(ServeConfig(release=(f"a={release}", f"b={release}", other), heads=head, open=True))
    with pytest.raises(FeatureError, match="the head pets was not fitted on any of these releases"):
        serve.build(ServeConfig(release=other, heads=head, open=True))
    for wrong in ({}, {"open": True, "keys": keys}, {"open": True, "host": "0.0.0.0"}):
        with pytest.raises(ValueError, match=r"set either --keys|must be a loopback address"):
            ServeConfig(release=release, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two entries have the name 'a'"):
        ServeConfig(release=("a=/x", "a=/y"), open=True)


def test_serve_yaml_passes_the_check() -> None:
    report = check.check_file(str(CLUSTER / "serve.yaml"))
    assert list(report["applications"]["igpt"]) == ["s1"]


SAID = yaml.safe_load((CLUSTER / "serve.yaml").read_text())


def places(said: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key at every level."""
    for key, value in said.items() if isinstance(said, dict) else enumerate(said) if isinstance(said, list) else ():
        if isinstance(said, dict):
            yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.parametrize("path", places(SAID), ids=lambda path: ".".join(map(str, path)))
def test_every_misspelt_or_missing_key_of_serve_yaml_is_reported(path: tuple[Any, ...]) -> None:
    """Ray takes nearly all of them. Those that only say what is the default anyway may be left out."""
    for mutate in (lambda at, key: at.__setitem__(f"{key}x", at.pop(key)), lambda at, key: at.pop(key)):
        said = copy.deepcopy(SAID)
        at = said
        for step in path[:-1]:
            at = at[step]
        mutate(at, path[-1])
        dropped = path[-1] not in at and f"{path[-1]}x" not in at
        if dropped and path[-1] in ("deployments", "autoscaling_config", "max_ongoing_requests", "slots", "gpus"):
            check.check_config(said, "it")
            continue
        with pytest.raises(SettingError, match=rf"it.*{path[-1]}|set either --keys|no release to serve"):
            check.check_config(said, "it")


def test_the_check_reports_wrong_values() -> None:
    for path, value, match in (
        (("http_options", "port"), "many", "port"),
        (("applications", 0, "import_path"), "igpt_ray.flows.serve:run", "import_path"),
        (("applications", 0, "deployments", 0, "name"), "release-s2", "expected one of api, release-s1"),
        (("applications", 0, "args", "replicas"), 0, "replicas"),
        (("applications", 0, "args"), {"release": "s1=/x", "open": True}, "not a loopback address"),
        (("applications",), [], "at least one"),
    ):
        said = copy.deepcopy(SAID)
        at: Any = said
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value
        with pytest.raises(SettingError, match=match):
            check.check_config(said, "it")


@pytest.mark.slow
def test_serve_yaml_deploys(cluster: str, release: str, keys: str) -> None:
    """With a release and keys that are here, and no GPU: what Ray makes of the file, autoscaling included."""
    import ray.serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    ray.serve.shutdown()
    said = copy.deepcopy(SAID)
    port = free_port()
    said["http_options"] |= {"host": "127.0.0.1", "port": port}
    said["applications"][0]["args"] |= {"release": f"s1={release}", "keys": keys, "gpus": 0}
    check.check_config(said, "it")
    ray.serve.start(http_options=said["http_options"])
    _get_global_client().deploy_apps(ServeDeploySchema(**said))
    client = Client(port)

    def ready() -> bool:
        try:
            return client.ask("/readyz").status == 200
        except OSError:
            return False

    until(ready, 90)
    assert client.ask("/v1/models").body["data"][0]["id"] == "s1"
    assert client.ask("/v1/completions", {"image": PICTURE, "rows": 15}).status == 200
    ray.serve.shutdown()
