"""Scores and completions of whole splits: of a store and of images, by a release and by a server, and repeated."""

import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import tiny_store
from PIL import Image
from serving import KEY, Place, free_port, serving

from igpt_ray import storage
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat, TokenStore
from igpt_ray.errors import CheckpointError, EndpointError, SettingError, SourceError
from igpt_ray.evaluate.config import EvaluateConfig, ScoreConfig
from igpt_ray.flows import batch, batch_units, evaluate
from igpt_ray.generate.config import CompleteConfig
from igpt_ray.serve import client as clients
from igpt_ray.serve.client import Client
from igpt_ray.serve.middleware import Keys

pytestmark = pytest.mark.ray

ALL = {"split": "train", "images": 0, "n": 2, "rows": 6}


@pytest.fixture
def store(prepared: str) -> str:
    return storage.join(prepared, "tokens")


@pytest.fixture(scope="module")
def place(released: str) -> Iterator[Place]:
    with serving({"digits": released}, keys=Keys([hashlib.sha256(KEY.encode()).digest()])) as place:
        yield place


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(batch_units.KEY, KEY)


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """By key, all that the tables of a folder say."""
    tables = [pq.read_table(path) for path in sorted(folder.rglob("*.parquet"))]
    return {row["key"]: row for table in tables for row in table.to_pylist()}


def nats(folder: Path) -> dict[str, float]:
    return {key: row["nats"] for key, row in rows(folder).items()}


def test_scores_of_tokens_and_images_by_release_and_server_are_equal(
    store: str, digit_images: str, released: str, place: Place, tmp_path: Path
) -> None:
    """And as evaluation says: another view or palette, images left out or in another order, numbers cut on the way."""
    expected = evaluate.evaluate(EvaluateConfig(release=released, tokens=store, split="train")).line()
    ways: dict[str, dict[str, Any]] = {
        "store": {"release": released, "tokens": store},
        "images": {"release": released, "source": digit_images, "unit_images": 50},
        "store-by-server": {"endpoint": place.url, "tokens": store},
        "images-by-server": {"endpoint": place.url, "model": "digits", "source": digit_images, "unit_images": 70},
    }
    for name, way in ways.items():
        report = batch.score(ScoreConfig(**way, split="train", out=str(tmp_path / name)))
        assert report["nats_per_token"] == pytest.approx(expected["nats_per_token"], rel=1e-6), name
        assert report["images"] == expected["images"]
        assert nats(tmp_path / name) == pytest.approx(nats(tmp_path / "store"), rel=1e-6)
    assert rows(tmp_path / "images").keys() == rows(tmp_path / "store").keys()


def test_completions_by_release_and_server_are_equal(
    store: str, digit_images: str, released: str, place: Place, tmp_path: Path
) -> None:
    ways: dict[str, dict[str, Any]] = {
        "here": {"release": released, "tokens": store},
        "there": {"endpoint": place.url, "tokens": store},
        "images-there": {"endpoint": place.url, "source": digit_images},
    }
    found = {}
    for name, way in ways.items():
        report = batch.complete(CompleteConfig(**way, **ALL, out=str(tmp_path / name)))
        assert report["images"] == TokenStore.open(store).manifest.rows("train")
        found[name] = {key: (row["original"], row["completions"]) for key, row in rows(tmp_path / name).items()}
        assert (
            np.asarray(
                Image.open(
                    tmp_path / name / "train/00000-v0.png" if way.get("tokens") else tmp_path / name / "train/00000.png"
                )
            ).ndim
            == 3
        )
    assert found["here"] == found["there"] == found["images-there"]
    few = batch.complete(CompleteConfig(**ways["there"], split="train", out=str(tmp_path / "few"), images=3))
    same = batch.complete(CompleteConfig(**ways["here"], split="train", out=str(tmp_path / "same"), images=3))
    assert few["completions"] == same["completions"] == 12
    assert rows(tmp_path / "few") == rows(tmp_path / "same")


def test_a_repeated_command_computes_only_missing_units(released: str, store: str, tmp_path: Path) -> None:
    settings = CompleteConfig(release=released, tokens=store, **ALL, out=str(tmp_path))
    batch.complete(settings)
    kept, damaged, missing = sorted((tmp_path / "train").glob("*.parquet"))
    whole, written = [path.read_bytes() for path in (kept, damaged, missing)], kept.stat().st_mtime_ns
    damaged.write_bytes(whole[1][:100])
    missing.unlink()
    batch.complete(settings)
    assert [path.read_bytes() for path in (kept, damaged, missing)] == whole
    assert kept.stat().st_mtime_ns == written
    batch.complete(settings.model_copy(update={"temperature": 0.5}))
    assert kept.read_bytes() != whole[0]


def test_an_unreadable_image_is_reported_and_the_others_are_scored(
    pictures: str, released: str, place: Place, tmp_path: Path
) -> None:
    for name, who in (("here", {"release": released}), ("there", {"endpoint": place.url})):
        report = batch.score(ScoreConfig(**who, source=pictures, split="train", out=str(tmp_path / name)))
        assert (report["images"], report["unreadable"]) == (9, 1)
        bad = rows(tmp_path / name)["dog/1.png"]
        assert bad["nats"] is None
        assert "damaged PNG" in bad["unreadable"]
        report = batch.complete(
            CompleteConfig(**who, source=pictures, split="train", out=str(tmp_path / f"{name}-done"), n=1, rows=7)
        )
        assert (report["images"], report["unreadable"]) == (9, 1)


def test_incompatible_inputs_are_refused_before_any_worker_starts(
    released: str, store: str, digit_images: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = {"out": str(tmp_path)}
    with pytest.raises(SourceError, match="has no split 'val': it has test, train"):
        batch.score(ScoreConfig(release=released, source=digit_images, split="val", **out))
    with pytest.raises(EndpointError, match="has no model 'cats': it has digits"):
        batch.score(ScoreConfig(endpoint=place.url, model="cats", tokens=store, **out))
    with pytest.raises(EndpointError, match="expected http"):
        batch.score(ScoreConfig(endpoint="ftp://x", tokens=store, **out))
    monkeypatch.setenv(batch_units.KEY, "wrong")
    with pytest.raises(EndpointError, match="401 the key is not valid"):
        batch.score(ScoreConfig(endpoint=place.url, tokens=store, **out))
    for wrong in ({}, {"release": "a", "endpoint": "b"}, {"release": "a", "tokens": "b", "source": "c"}):
        with pytest.raises(ValueError, match="set exactly one of"):
            ScoreConfig(**wrong, **out)


def test_the_default_split_is_test_or_else_the_only_one(released: str, digit_images: str, tmp_path: Path) -> None:
    """A folder of a user's own images has only the split `train`."""
    settings = ScoreConfig(release=released, source=digit_images, out=str(tmp_path))
    assert batch_units.plan_batch(settings)[0].split == "test"
    only = ScoreConfig(release=released, source=f"{digit_images}/train", out=str(tmp_path))
    assert batch_units.plan_batch(only)[0].split == "train"
    shutil.copytree(f"{digit_images}/train", tmp_path / "images/train")
    shutil.copytree(f"{digit_images}/test", tmp_path / "images/val")
    with pytest.raises(SettingError, match="has the splits train, val: choose --split"):
        batch_units.plan_batch(ScoreConfig(release=released, source=f"{tmp_path}/images", out=str(tmp_path)))


def test_a_store_with_another_token_format_than_the_server_is_refused(
    place: Place, palette: Palette, kind: TokenFormat, tmp_path: Path
) -> None:
    other = tiny_store(str(tmp_path / "tokens"), palette, kind)
    said = f"the model at {place.url} was trained with n_px 8, but {other.root} has {kind.n_px}"
    with pytest.raises(CheckpointError, match=said):
        batch.score(ScoreConfig(endpoint=place.url, tokens=other.root, out=str(tmp_path / "out")))


def test_a_client_retries_a_busy_server_and_sends_its_key_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """429 and 503 are retried after the time in Retry-After; a redirect or a page of another server is an error."""
    answers = [(429, {"Retry-After": "0"}), (503, {}), (502, {}), (200, {})]
    seen = []

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            status, headers = answers.pop(0)
            self.send_response(status)
            html = status in (404, 502)
            for name, value in {"Content-Type": "text/html" if html else "application/json", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"<html>" if html else json.dumps({"data": [{"id": "a"}]}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(clients.time, "sleep", lambda seconds: None)
    with http.server.HTTPServer(("127.0.0.1", port := free_port()), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Client(f"http://127.0.0.1:{port}/", "k")
        assert client.model_info() == {"id": "a"}
        assert seen == ["Bearer k"] * 4
        answers.append((302, {"Location": f"http://127.0.0.1:{port}/elsewhere"}))
        with pytest.raises(EndpointError, match="302"):
            client.model_info()
        answers.append((404, {}))
        with pytest.raises(EndpointError, match="404, not the JSON of an igpt_ray server: check --endpoint"):
            client.model_info()
        assert len(seen) == 6
        server.shutdown()
    monkeypatch.setattr(clients, "PATIENCE_S", 0)
    with pytest.raises(EndpointError, match="does not answer"):
        client.model_info()
