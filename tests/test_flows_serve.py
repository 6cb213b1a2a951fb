"""The HTTP server, over real HTTP."""

import base64
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from igpt_ray import config, storage
from igpt_ray.errors import CheckpointError, SettingError
from igpt_ray.flows import serve

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def address(cluster: str, released: str) -> Iterator[str]:
    import ray.serve

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray.serve.run(serve.build(config.Serve(release=released, replicas=2)), name="igpt")
    yield f"http://127.0.0.1:{port}"
    ray.serve.shutdown()


@pytest.fixture
def picture(digit_images: str) -> str:
    data = next(path for path in sorted(Path(digit_images, "test").rglob("*.png"))).read_bytes()
    return base64.b64encode(data).decode()


def ask(url: str, body: dict[str, Any] | bytes | None = None) -> tuple[int, dict[str, Any]]:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_what_is_served_is_what_the_painter_paints(address: str, released: str, picture: str) -> None:
    body = {"image": picture, "n": 2, "seed": 5, "rows": 3}
    status, served = ask(f"{address}/v1/completions", body)
    painted = serve.Painter(released).complete(serve.CompletionRequest.model_validate(body))
    assert status == 200
    assert [x["tokens"] for x in served["data"]] == [x["tokens"] for x in painted["data"]]
    assert served["original"] == painted["original"]
    assert served["data"][0]["tokens"][:24] == served["data"][1]["tokens"][:24]
    assert served["data"][0]["tokens"][24:] != served["data"][1]["tokens"][24:]
    status, scored = ask(f"{address}/v1/score", {"image": picture})
    assert status == 200
    assert scored == pytest.approx(serve.Painter(released).score(serve.ScoreRequest(image=picture)), rel=1e-6)


def test_bad_requests_get_a_code_and_a_reason_and_the_server_stays_up(address: str, picture: str) -> None:
    text = base64.b64encode(b"hello").decode()
    for body, status, code in (
        ({"image": text}, 400, "invalid_image"),
        ({"image": "not base64!"}, 400, "invalid_image"),
        ({"image": picture, "rows": 9}, 400, "invalid_setting"),
        ({"image": picture, "n": 17}, 422, "invalid_body"),
        ({"image": picture, "temperatur": 1}, 422, "invalid_body"),
        ({}, 422, "invalid_body"),
        (b'{"image": "", "temperature": NaN}', 422, "invalid_body"),
        (b"\x00", 422, "invalid_body"),
    ):
        answered, answer = ask(f"{address}/v1/completions", body)
        assert (answered, answer["error"]["code"]) == (status, code), (body, answer)
        assert "\n" not in answer["error"]["message"]
    assert ask(f"{address}/readyz") == (200, {"status": "ready"})
    assert ask(f"{address}/v1/models")[1]["data"][0]["n_px"] == 8


def test_a_busy_port_and_a_missing_release_are_refused_at_once(released: str, tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(SettingError, match=f"cannot listen on 127.0.0.1:{port} .*--port"):
            serve.run(config.Serve(release=released, port=port))
    with pytest.raises(CheckpointError, match="no release at"):
        serve.run(config.Serve(release=str(tmp_path)))


def test_the_cluster_s_serve_file_builds_the_application(released: str) -> None:
    """Ray's schema accepts misspelt keys, so every key is compared with what the schema knows."""
    from ray.serve.schema import ServeDeploySchema

    path = Path(__file__).resolve().parent.parent / "cluster" / "serve.yaml"
    raw = yaml.safe_load(path.read_text())
    known = ServeDeploySchema(**raw).model_dump()
    assert raw.keys() <= known.keys()
    assert raw["http_options"].keys() <= known["http_options"].keys()
    for application in raw["applications"]:
        assert application.keys() <= known["applications"][0].keys()
        module, name = application["import_path"].split(":")
        assert getattr(__import__(module, fromlist=[name]), name) is serve.build
        assert config.Serve.model_validate(application["args"]).release == storage.absolute(
            raw["applications"][0]["args"]["release"]
        )
