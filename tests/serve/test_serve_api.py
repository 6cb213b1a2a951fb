"""The API over real HTTP with a replica in this process: responses and errors."""

import asyncio
import base64
import hashlib
import io
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving import KEY, Place, base64_of, events, picture, probe_head, serving, tiny_release, until

from igpt_ray import weights
from igpt_ray.data import pixels
from igpt_ray.evaluate import features
from igpt_ray.evaluate.heads import load_head
from igpt_ray.evaluate.likelihood import image_nats
from igpt_ray.generate import completion
from igpt_ray.serve import middleware, schemas
from igpt_ray.serve.decoder_pool import DecoderPool
from igpt_ray.serve.middleware import Keys
from igpt_ray.serve.schemas import CompletionRequest, Reader

PICTURE = base64_of(picture())


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_release(str(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def place(release: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server of two releases, the first with two heads, on loopback without keys."""
    folder = tmp_path_factory.mktemp("others")
    other = tiny_release(str(folder / "other"), seed=1)
    heads = {
        "pets": probe_head(str(folder / "pets"), release, ["cat", "dog"]),
        "moods": probe_head(str(folder / "moods"), release, ["calm", "wild", "shy"], 2, "bfloat16"),
    }
    with serving({"tiny": release, "other": other}, heads) as place:
        yield place


@pytest.fixture(scope="module")
def keyed(release: str) -> Iterator[Place]:
    with serving({"tiny": release}, keys=Keys([hashlib.sha256(KEY.encode()).digest()])) as place:
        yield place


def complete(place: Place, **words: Any) -> dict[str, Any]:
    answer = place.ask("/v1/completions", {"image": PICTURE, "response_format": "tokens", **words})
    assert answer.status == 200, answer
    return answer.body


# ------------------------------------------------------------------------------------------------ what it answers


def test_completions_equal_the_sampler_s_and_preserve_the_prompt(place: Place, release: str) -> None:
    """The view of the image, the number of prompt rows and the order of the seeds are correct."""
    loaded = weights.load_release(release)
    said = complete(place, rows=3, n=2, seed=5, temperature=0.8, top_k=4)
    rgb = pixels.centre_view(base64.b64decode(PICTURE), 8, pixels.FAST)
    tokens = loaded.palette.encode(rgb).reshape(1, -1).astype(np.int64)
    assert said["original"]["tokens"] == tokens[0].tolist()
    expected = completion.complete(loaded.model, torch.from_numpy(tokens[:, :24]), 2, [5, 6], 0.8, 4)
    assert [x["tokens"] for x in said["data"]] == expected.tolist()
    assert [x["seed"] for x in said["data"]] == [5, 6]
    assert said["usage"] == {"painted_pixels": 2 * 40}


def test_completions_are_png_unless_the_response_format_is_tokens(place: Place, release: str) -> None:
    tokens = complete(place, seed=9)
    pngs = place.ask("/v1/completions", {"image": PICTURE, "seed": 9}).body
    rgb = np.asarray(Image.open(io.BytesIO(base64.b64decode(pngs["data"][0]["b64_png"]))))
    palette = weights.load_release(release).palette
    assert (rgb.reshape(-1, 3) == palette.decode(np.array(tokens["data"][0]["tokens"]))).all()
    assert "tokens" not in pngs["data"][0]


def test_a_mask_is_rows_of_bits_or_a_transparent_png(place: Place) -> None:
    """Both forms of a mask are equivalent, and opaque pixels are unchanged at any position."""
    bits = np.random.default_rng(2).integers(0, 2, (8, 8))
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 3] = bits * 255
    out = io.BytesIO()
    Image.fromarray(rgba.repeat(5, 0).repeat(5, 1)).save(out, "PNG")
    said = complete(place, mask=bits.tolist(), n=3)
    assert said["data"] == complete(place, mask=base64_of(out.getvalue()), n=3)["data"]
    original = np.array(said["original"]["tokens"])
    for one in said["data"]:
        assert (np.array(one["tokens"])[bits.ravel() == 1] == original[bits.ravel() == 1]).all()
    assert said["usage"]["painted_pixels"] == 3 * (bits == 0).sum()


def test_a_form_with_files_is_equivalent_to_json(place: Place) -> None:
    words = {"rows": 2, "n": 2, "seed": 3, "response_format": "tokens", "model": "tiny"}
    body = b"".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in words.items()
    )
    body += b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + picture() + b"\r\n--x--\r\n"
    answer = place.ask("/v1/completions", body, Content_Type="multipart/form-data; boundary=x")
    assert answer.status == 200, answer
    assert answer.body["data"] == complete(place, **words)["data"]


def test_a_stream_sends_every_row_and_then_the_response_without_streaming(place: Place) -> None:
    body = {"image": PICTURE, "response_format": "tokens", "n": 2, "rows": 5, "seed": 4}
    said = events(place.ask("/v1/completions", body | {"stream": True}).body)
    assert [name for name, _ in said] == ["started", "row", "row", "row", "completed"]
    whole = place.ask("/v1/completions", body).body
    assert said[-1][1]["data"] == whole["data"]
    assert said[0][1]["original"] == whole["original"]
    for name, data in said[1:-1]:
        for strip, one in zip(data["data"], whole["data"], strict=True):
            assert strip["tokens"] == one["tokens"][data["row"] * 8 : data["row"] * 8 + 8], name


def test_a_request_may_contain_tokens_of_a_store(place: Place) -> None:
    said = complete(place, rows=4)
    tokens = said["original"]["tokens"]
    body = {"tokens": tokens, "rows": 4, "response_format": "tokens"}
    assert place.ask("/v1/completions", body).body["data"] == said["data"]


def test_a_completion_depends_on_its_seed_and_not_on_31_concurrent_requests(place: Place) -> None:
    """Streamed or not; the other requests differ in image, prompt, number of samples and settings."""
    alone = complete(place, seed=7, n=2, rows=3)["data"]

    def other(i: int) -> Any:
        words = {"image": base64_of(picture(i)), "rows": i % 8, "n": 1 + i % 3, "seed": i, "temperature": 0.5 + i / 20}
        return place.ask("/v1/completions", words | {"stream": bool(i % 2), "top_k": i % 5}).status

    with ThreadPoolExecutor(33) as pool:
        others = [pool.submit(other, i) for i in range(31)]
        among = pool.submit(complete, place, seed=7, n=2, rows=3)
        body = {"image": PICTURE, "response_format": "tokens", "seed": 7, "n": 2, "rows": 3, "stream": True}
        streamed = pool.submit(place.ask, "/v1/completions", body)
        assert {done.result() for done in others} == {200}
        assert among.result()["data"] == alone
        assert events(streamed.result().body)[-1][1]["data"] == alone


def test_scores_equal_the_evaluation_s_and_are_the_sums_over_pixels(place: Place, release: str) -> None:
    loaded = weights.load_release(release)
    pictures = [base64_of(picture(i)) for i in range(3)]
    said = place.ask("/v1/score", {"image": pictures, "per_pixel": True}).body
    tokens = np.array([one["tokens"] for one in said["data"]], np.uint16)
    assert [one["nats"] for one in said["data"]] == pytest.approx(image_nats(loaded.model, tokens, 64), rel=1e-6)
    for one in said["data"]:
        assert sum(one["nats_by_pixel"]) == pytest.approx(one["nats"])
        assert one["bits_per_pixel"] == pytest.approx(one["nats"] / 64 / np.log(2))
    one_by_one = [place.ask("/v1/score", {"image": one}).body["data"][0]["nats"] for one in pictures]
    assert one_by_one == pytest.approx([one["nats"] for one in said["data"]], rel=1e-6)


def test_features_are_those_of_the_requested_layer(place: Place, release: str) -> None:
    model, said = weights.load_release(release).model, place.ask("/v1/score", {"image": PICTURE, "per_pixel": True})
    tokens = np.array([said.body["data"][0]["tokens"]], np.uint16)
    for layer, pooling in ((0, "mean"), (2, "max"), (1, "last")):
        said = place.ask("/v1/features", {"image": PICTURE, "layer": layer, "pooling": pooling})
        expected = features.pooled(model, tokens, [], [layer], pooling, 1)[0, 0]  # type: ignore[arg-type]
        assert said.body["data"][0]["features"] == pytest.approx(expected, rel=1e-5)
    assert place.ask("/v1/features", {"image": PICTURE}).body["layer"] == 1


def test_classes_are_those_of_the_requested_head(place: Place, release: str, tmp_path: Path) -> None:
    head = load_head(probe_head(str(tmp_path), release, ["calm", "wild", "shy"], 2, "bfloat16"))
    tokens = np.array([place.ask("/v1/score", {"image": PICTURE, "per_pixel": True}).body["data"][0]["tokens"]])
    network = features.network(release, "cpu", None, "bfloat16")
    expected = head.probabilities(network, tokens.astype(np.uint16), [], 1)[0]
    said = place.ask("/v1/classify", {"image": PICTURE, "head": "moods"}).body["data"][0]["classes"]
    assert [one["probability"] for one in said] == pytest.approx(sorted(expected, reverse=True))
    assert [one["index"] for one in said] == (-expected).argsort().tolist()
    assert said[0]["class"] == head.classes[int(expected.argmax())]
    first = place.ask("/v1/classify", {"image": PICTURE, "top_k": 1}).body
    assert (first["head"], len(first["data"][0]["classes"])) == ("pets", 1)


def test_a_fine_tuned_release_classifies_with_its_own_head(tmp_path: Path) -> None:
    release = tiny_release(str(tmp_path / "tuned"), n_class=2)
    with serving({"tuned": release}) as place:
        said = place.ask("/v1/classify", {"image": PICTURE}).body
    assert said["head"] == "fine-tuned"
    assert {one["class"] for one in said["data"][0]["classes"]} == {"cat", "dog"}
    assert sum(one["probability"] for one in said["data"][0]["classes"]) == pytest.approx(1)


def test_a_mask_without_pixels_to_generate_is_an_error(place: Place) -> None:
    """Black and white have no meaning: tools disagree on which of them is to be generated."""
    black_and_white = np.zeros((40, 40, 3), np.uint8)
    black_and_white[10:30, 10:30] = 255
    grey = Image.fromarray(black_and_white).convert("L")
    opaque = Image.fromarray(black_and_white).convert("RGBA")
    for mask in (grey, grey.convert("1"), Image.fromarray(black_and_white), opaque, [[1] * 8] * 8):
        if isinstance(mask, Image.Image):
            out = io.BytesIO()
            mask.save(out, "PNG")
            mask = base64_of(out.getvalue())
        answer = place.ask("/v1/completions", {"image": PICTURE, "mask": mask})
        assert (answer.status, answer.code) == (400, "invalid_setting"), answer
        assert "nothing to generate" in answer.body["error"]["message"]


def test_only_listed_models_can_be_requested_and_each_has_its_own_results(place: Place) -> None:
    listed = place.ask("/v1/models").body["data"]
    assert [one["id"] for one in listed] == ["tiny", "other"]
    assert [head["id"] for head in listed[0]["heads"]] == ["pets", "moods"]
    assert not listed[1]["heads"]
    assert len(listed[0]["palette"]) == 16
    assert complete(place, model="tiny")["data"] == complete(place)["data"] != complete(place, model="other")["data"]
    for name in ("Tiny", "../tiny", "/etc/passwd", "tiny/", "s3://bucket/x", "%2e%2e", "tiny\x00"):
        answer = place.ask("/v1/score", {"image": PICTURE, "model": name})
        assert (answer.status, answer.code) == (404, "model_not_found"), name
    assert place.ask("/v1/classify", {"image": PICTURE, "model": "other"}).code == "head_not_found"


def test_the_page_the_schema_and_the_health_checks_need_no_key_and_no_other_host(place: Place) -> None:
    page = place.ask("/")
    assert page.status == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    routes = place.ask("/openapi.json").body["paths"]
    assert set(routes) >= {"/v1/completions", "/v1/features", "/v1/classify", "/v1/score", "/v1/models", "/readyz"}
    assert set(routes["/v1/score"]["post"]["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert place.ask("/healthz").body == {"status": "ok"}
    assert place.ask("/readyz").body == {"status": "ready"}
    assert place.ask("/docs").status == 200


# ------------------------------------------------------------------------------------------------ errors


def png_of(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG whose header has this size, with an arbitrary body."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


HOSTILE = {
    "no file at all": (b"", "invalid_image"),
    "text": (b"hello", "invalid_image"),
    "a cut file": (picture()[:-20], "invalid_image"),
    "a flipped bit": (picture()[:60] + bytes([picture()[60] ^ 4]) + picture()[61:], "invalid_image"),
    "a bomb by its header": (png_of(60_000, 60_000), "invalid_image"),
    "a bomb within the jobs' limits": (
        png_of(8000, 8000, zlib.compress(bytes(8000 * 8001 * 3 // 100))),
        "invalid_image",
    ),
    "a needle": (png_of(20_000, 1, zlib.compress(bytes(60_001))), "invalid_image"),
    "rows that inflate without end": (png_of(8, 8, zlib.compress(bytes(10_000_000))), "invalid_image"),
    "a GIF": (b"GIF89a" + bytes(100), "invalid_image"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "invalid_image"),
    "a TIFF": (b"II*\x00" + bytes(100), "invalid_image"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malicious_image_is_an_error(place: Place, name: str) -> None:
    data, code = HOSTILE[name]
    for path in ("/v1/completions", "/v1/score"):
        started = time.perf_counter()
        answer = place.ask(path, {"image": base64_of(data)})
        assert (answer.status, answer.code) == ((400, code) if data else (400, "invalid_image")), answer
        assert time.perf_counter() - started < 5
        assert "\n" not in answer.body["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"image": "not base64!"}, 400, "invalid_image"),
        ({"image": "http://169.254.169.254/latest/meta-data"}, 400, "invalid_image"),
        ({"image": "file:///etc/passwd"}, 400, "invalid_image"),
        ({"image": PICTURE, "rows": 9}, 400, "invalid_setting"),
        ({"image": PICTURE, "n": 9}, 400, "invalid_setting"),  # more than there are slots
        ({"image": PICTURE, "n": 17}, 422, "invalid_body"),
        ({"image": PICTURE, "n": 0}, 422, "invalid_body"),
        ({"image": PICTURE, "n": 10**400}, 422, "invalid_body"),
        ({"image": PICTURE, "temperatur": 1}, 422, "invalid_body"),
        ({"image": PICTURE, "temperature": 1e308}, 422, "invalid_body"),
        ({"image": PICTURE, "top_p": 0}, 422, "invalid_body"),
        ({"image": PICTURE, "top_k": -1}, 422, "invalid_body"),
        ({"image": PICTURE, "seed": -1}, 422, "invalid_body"),
        ({"image": PICTURE, "seed": [1, 2], "n": 3}, 422, "invalid_body"),
        ({"image": PICTURE, "rows": 1, "mask": [[1] * 8] * 8}, 422, "invalid_body"),
        ({"image": PICTURE, "mask": [[1] * 8] * 7}, 400, "invalid_setting"),
        ({"image": PICTURE, "mask": [[2] * 8] * 8}, 422, "invalid_body"),
        ({"image": PICTURE, "mask": base64_of(b"hello")}, 400, "invalid_image"),
        ({"image": [PICTURE, PICTURE]}, 422, "invalid_body"),
        ({"image": PICTURE, "tokens": [1] * 64}, 422, "invalid_body"),
        ({"tokens": [1] * 63}, 400, "invalid_setting"),
        ({"tokens": [16] * 64}, 400, "invalid_setting"),
        ({"tokens": [-1] * 64}, 422, "invalid_body"),
        ({"tokens": []}, 422, "invalid_body"),
        ({"tokens": [[]]}, 422, "invalid_body"),
        ({}, 422, "invalid_body"),
        ([], 422, "invalid_body"),
        (b'{"image": "", "temperature": NaN}', 422, "invalid_body"),
        (b'{"image": "", "temperature": Infinity}', 422, "invalid_body"),
        (b"\x00", 422, "invalid_body"),
        (b"\xff\xfe{}", 422, "invalid_body"),
        (b'{"image": "\\ud800"}', 422, "invalid_body"),
        (b"[" * 100_000, 422, "invalid_body"),
        (b'{"a":' * 50_000, 422, "invalid_body"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_an_invalid_body_is_an_error_with_a_code(place: Place, body: Any, status: int, code: str) -> None:
    answer = place.ask("/v1/completions", body)
    assert (answer.status, answer.code) == (status, code), answer
    assert PICTURE not in answer.body["error"]["message"]


def test_every_error_is_json_with_a_code(place: Place) -> None:
    for path, body, status, code in (
        ("/nothing", None, 404, "not_found"),
        ("/v1/models/../../etc/passwd", None, 404, "not_found"),
        ("/v1/completions", None, 405, "method_not_allowed"),
        ("/v1/models", {}, 405, "method_not_allowed"),
    ):
        answer = place.ask(path, body)
        assert (answer.status, answer.code) == (status, code), path
    for kind, status in (("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("multipart/form-data", 400)):
        answer = place.ask("/v1/score", b"a=b", Content_Type=kind)
        assert answer.status == status, answer
        assert answer.code


def raw(place: Place, head: str, *parts: bytes, pause: float = 0) -> bytes:
    """The server's response to raw bytes, which are sent part by part until it responds."""
    with socket.create_connection((place.host, place.port), timeout=30) as s:
        s.sendall(head.replace("\n", "\r\n").encode())
        try:
            for part in parts:
                s.sendall(part)
                time.sleep(pause)
        except OSError:
            pass  # the server has closed the connection after its response
        return s.recv(65536)


POST = "POST /v1/score HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\n"


def test_a_body_over_the_limit_is_rejected_by_its_length_or_while_it_is_read(place: Place) -> None:
    """64 MB with a Content-Length, and in chunks without one, of which the server reads little more than its limit."""
    answered = raw(place, f"{POST}Content-Length: {64 << 20}\n\n")
    assert answered.startswith(b"HTTP/1.1 413")
    assert b'"too_large"' in answered
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    assert raw(place, f"{POST}Transfer-Encoding: chunked\n\n", *[chunk] * 64).startswith(b"HTTP/1.1 413")
    for length in ("-1", "1e9", "99999999999999999999999"):
        assert raw(place, f"{POST}Content-Length: {length}\n\n")[9:12] in (b"400", b"413"), length


def test_a_slow_body_times_out(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 1)
    with serving({"tiny": release}) as place:
        started = time.perf_counter()
        answered = raw(place, f"{POST}Content-Length: 1000\n\n", *[b" "] * 20, pause=0.1)
        assert answered.startswith(b"HTTP/1.1 408")
        assert b'"slow_body"' in answered
        assert time.perf_counter() - started < 4
        short = raw(place, f"{POST}Content-Length: 1000\n\n", b"{}", pause=0.1)  # shorter than its Content-Length
        assert short.startswith(b"HTTP/1.1 408")


# ------------------------------------------------------------------------------------------------ access and limits


def test_every_route_behaves_with_and_without_a_key(keyed: Place) -> None:
    body = {"image": PICTURE}
    routes = [(f"/v1/{name}", body) for name in ("completions", "features", "score")]
    for path, data in [*routes, ("/v1/classify", body), ("/v1/models", None), ("/nothing", None)]:
        assert keyed.ask(path, data).code == "missing_key"
        for wrong in ("wrong", KEY[:-1], KEY + "x", "é", hashlib.sha256(KEY.encode()).hexdigest()):
            answer = keyed.ask(path, data, key=wrong)
            assert (answer.status, answer.code) == (401, "wrong_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        basic = keyed.ask(path, data, Authorization="Basic " + base64_of(f"user:{KEY}".encode()))
        assert basic.code == "missing_key"
        expected = {"/nothing": 404, "/v1/classify": 404}.get(path, 200)
        assert keyed.ask(path, data, key=KEY).status == expected
    for path in middleware.PUBLIC:
        assert keyed.ask(path).status == keyed.ask(path, key="wrong").status == 200


def test_a_request_without_a_key_is_rejected_before_its_body_is_read(keyed: Place) -> None:
    assert raw(keyed, f"{POST}Content-Length: {64 << 20}\n\n").startswith(b"HTTP/1.1 401")


def test_keys_are_read_as_hashes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{hashlib.sha256(KEY.encode()).hexdigest()}  -\n"
    (tmp_path / "keys").write_text(f"# who may ask\n{line}\n{'0' * 64} nobody\n")
    monkeypatch.setenv("IGPT_TEST_KEYS", line)
    for where in (str(tmp_path / "keys"), "env:IGPT_TEST_KEYS"):
        keys = Keys.load(where)
        assert keys.accepts(KEY)
        assert not keys.accepts("0" * 64)
        assert not keys.accepts("")
    (tmp_path / "plain").write_text(KEY)
    for wrong in (str(tmp_path / "plain"), "env:IGPT_NO_SUCH_KEYS"):
        with pytest.raises(ValueError, match="expected one line per key") as error:
            Keys.load(wrong)
        assert KEY not in str(error.value)


def test_without_keys_only_loopback_requests_of_the_same_origin_are_allowed(place: Place) -> None:
    assert place.ask("/v1/models", Host="localhost:1").status == 200
    assert place.ask("/v1/models", Host="evil.example").code == "foreign_host"
    assert place.ask("/v1/models", Origin="https://evil.example").code == "foreign_origin"
    assert place.ask("/v1/models", Origin=place.url).status == 200
    scope = {"type": "http", "client": ("10.0.0.7", 1), "path": "/v1/models", "headers": []}
    with pytest.raises(middleware.APIError, match="own machine"):
        middleware.RequestGuard(lambda *_: None, None, 1)._authenticate(scope, middleware.Headers(scope=scope))  # type: ignore[arg-type]


def test_a_full_queue_returns_429_and_the_server_recovers_at_once(release: str) -> None:
    with serving({"tiny": release}, slots=2, queue=4) as place:
        words = {"image": PICTURE, "rows": 0, "n": 2, "response_format": "tokens"}
        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(lambda _: place.ask("/v1/completions", words), range(120)))
        assert {answer.status for answer in answers} == {200, 429}
        refused = next(answer for answer in answers if answer.status == 429)
        assert refused.code == "overloaded"
        assert int(refused.headers["retry-after"]) > 0
        generated = [answer.body["data"] for answer in answers if answer.status == 200]
        assert all(one == generated[0] for one in generated)
        assert place.ask("/v1/completions", words).body["data"] == generated[0]


def test_a_request_of_one_pixel_always_completes(place: Place) -> None:
    """It may finish in the step that runs during its submission, before its handler waits for a notification."""
    mask = [[1] * 8] * 7 + [[1] * 7 + [0]]
    body = {"image": PICTURE, "mask": mask}
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: place.ask("/v1/completions", body).status, range(400))) == {200}


def test_the_total_size_of_bodies_is_limited(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many bodies within their own limit could fill the memory. A rejected body is released from the total."""
    monkeypatch.setattr(middleware, "MAX_HELD", 100_000)
    large = b'{"image": "' + bytes(200_000).replace(b"\0", b"A") + b'"}'
    assert place.ask("/v1/score", large).code == "overloaded"
    monkeypatch.setattr(middleware, "MAX_HELD", 300_000)
    for _ in range(3):
        assert place.ask("/v1/score", large).code == "invalid_image"


def test_a_disconnect_frees_the_slots_within_a_step(release: str, tmp_path: Path) -> None:
    """A client may disconnect during the stream, before the first row, or while it waits for a slot."""
    slow = tiny_release(str(tmp_path), n_px=32, n_layer=4, n_embd=128)
    with serving({"slow": slow}, slots=2) as place:
        engine = place.replica.loop.engine
        for stream in (True, False):
            words = json.dumps({"image": PICTURE, "rows": 0, "n": 2, "stream": stream}).encode()
            head = POST.replace("score", "completions").replace("\n", "\r\n") + f"Content-Length: {len(words)}\r\n\r\n"
            clients = [socket.create_connection((place.host, place.port)) for _ in range(2)]
            for client in clients:
                client.sendall(head.encode() + words)
            until(lambda: (engine.slots_in_use, engine.waiting) == (2, 1))
            clients[1].close()
            until(lambda: engine.waiting == 0)
            before = engine.generated
            clients[0].close()
            until(lambda: engine.slots_in_use == 0)
            assert engine.generated - before < 200  # of 2048: generation has stopped


def test_a_failed_engine_returns_500_and_fails_the_health_check(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"tiny": release}) as place:

        def broken() -> None:
            raise RuntimeError("a secret of the device")

        monkeypatch.setattr(place.replica.loop.engine, "step", broken)
        answer = place.ask("/v1/completions", {"image": PICTURE})
        assert (answer.status, answer.code) == (500, "internal_error")
        assert "secret" not in answer.body["error"]["message"]
        with pytest.raises(RuntimeError):
            place.replica.check_health()
        assert place.ask("/readyz").code == "not_ready"


def test_seeds_masks_and_limits_are_as_documented(release: str) -> None:
    decoders = DecoderPool(1)
    reader = Reader(weights.load_config(release), weights.load_release(release).palette, decoders)
    asked = CompletionRequest(tokens=[[0] * 64], n=3, seed=2**64 - 1)
    assert asked.seeds == (2**64 - 1, 2**64, 2**64 + 1)
    assert CompletionRequest(tokens=[[0] * 64], n=2, seed=[9, 1]).seeds == (9, 1)
    assert asyncio.run(reader.prompt_mask(asked)).sum() == 32
    decoders.close()
    assert schemas.MAX_BASE64 < schemas.MAX_BODY


def test_many_concurrent_requests_all_complete(place: Place) -> None:
    with ThreadPoolExecutor(32) as pool:
        said = list(pool.map(lambda i: place.ask("/v1/score", {"image": base64_of(picture(i))}).status, range(64)))
    assert set(said) == {200}
    assert threading.active_count() < 60
