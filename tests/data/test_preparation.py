"""Two preparations at one root: equal settings share the work, others are refused before they write."""

import json
import multiprocessing
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from igpt_ray import storage
from igpt_ray.data import preparation, prepare, verify
from igpt_ray.data.config import PixelsConfig, PrepareConfig, VerifyConfig
from igpt_ray.data.mapper import serial_map
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import SourceError, TokenStoreError

PIXELS = PixelsConfig(n_px=8, crop="random")


@pytest.fixture
def settings(prepared: str, digit_images: str, tmp_path: Path) -> PrepareConfig:
    return PrepareConfig(
        source=digit_images,
        palette=storage.join(prepared, "palette.npy"),
        tokens=str(tmp_path / "tokens"),
        shard_images=30,
        pixels=PIXELS,
    )


class Killed(Exception):
    pass


def interrupted(tasks: Any, worker: Any, arguments: Any, pool: Any) -> Iterator[Any]:
    """A mapper that ends after its first task."""
    yield from serial_map(tasks[:1], worker, arguments, pool)
    raise Killed


def attempt(settings: PrepareConfig, together: threading.Barrier) -> str:
    """Prepare when both processes are ready; the sha256 of the manifest, or the error."""
    together.wait(60)
    try:
        return str(prepare.prepare(settings, serial_map)["manifest_sha256"])
    except TokenStoreError as error:
        return f"refused: {error}"


def race(*all_settings: PrepareConfig) -> list[str]:
    """The outcome of `attempt` in one process per settings, all at once."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(len(all_settings), context) as processes:
        together = manager.Barrier(len(all_settings))
        return [f.result() for f in [processes.submit(attempt, s, together) for s in all_settings]]


@pytest.mark.parametrize("place", ["local", "moto"], indirect=True)
def test_of_two_racing_preparations_with_different_settings_one_is_refused(settings: PrepareConfig, place: str) -> None:
    """Both write the same paths, so that one could commit a manifest whose shards the other has overwritten."""
    one = settings.model_copy(update={"tokens": storage.join(place, "tokens")})
    other = one.model_copy(update={"pixels": PixelsConfig(n_px=8, crop="centre")})
    outcomes = race(one, other)
    refused = [outcome for outcome in outcomes if outcome.startswith("refused")]
    assert len(refused) == 1, outcomes
    assert "another preparation has claimed" in refused[0]
    assert "its crop is" in refused[0]
    store = TokenStore.open(one.tokens)
    assert store.sha256 in outcomes
    winner = (one, other)[outcomes.index(store.sha256)]
    assert store.manifest.made_by["settings"]["pixels"] == winner.pixels.model_dump()
    assert verify.verify(VerifyConfig(tokens=one.tokens, remake=99), serial_map)["remade"] == 6


@pytest.mark.parametrize("place", ["local", "moto"], indirect=True)
def test_two_racing_preparations_with_equal_settings_end_with_one_store(settings: PrepareConfig, place: str) -> None:
    one = settings.model_copy(update={"tokens": storage.join(place, "tokens")})
    outcomes = race(one, one)
    assert outcomes == [TokenStore.open(one.tokens).sha256] * 2
    assert verify.verify(VerifyConfig(tokens=one.tokens, remake=99), serial_map)["remade"] == 6


def test_an_interrupted_preparation_goes_on_with_its_own_settings_only(
    settings: PrepareConfig, prepared: str, digit_images: str, place: str, tmp_path: Path
) -> None:
    """Each differing field is named before a byte is written; without the claim, the next settings may use the root."""
    settings = settings.model_copy(update={"tokens": storage.join(place, "tokens")})
    with pytest.raises(Killed):
        prepare.prepare(settings, interrupted)
    before = {entry.uri: storage.read(entry.uri) for entry in storage.walk(settings.tokens)}
    shutil.copytree(digit_images, tmp_path / "fewer")
    next((tmp_path / "fewer/train/3").iterdir()).unlink()
    for change, complaint in (
        ({"pixels": PixelsConfig(n_px=4)}, "its n_px is 8, not 4"),
        ({"pixels": PixelsConfig(n_px=8, crop="centre")}, "its crop is random, not centre"),
        ({"pixels": PixelsConfig(n_px=8, pipeline="reference")}, "its pipeline is fast"),
        ({"palette": "openai"}, "its n_vocab is 16, not 512"),
        ({"views": 2}, "its views is 1, not 2"),
        ({"holdout": 0.1}, "its holdout is 0.0, not 0.1"),
        ({"shard_images": 31}, "its shard_images is 30, not 31"),
        ({"source": str(tmp_path / "fewer")}, "its source has another listing"),
    ):
        if "pipeline" in complaint:
            shutil.copy(storage.join(prepared, "palette.npy"), tmp_path / "palette.npy")
            change["palette"] = str(tmp_path / "palette.npy")  # without the record of its own pipeline
        with pytest.raises(TokenStoreError, match=complaint) as refusal:
            prepare.prepare(settings.model_copy(update=change), serial_map)
        assert f"delete {settings.tokens}/preparation.json" in str(refusal.value)
    assert {entry.uri: storage.read(entry.uri) for entry in storage.walk(settings.tokens)} == before
    prepare.prepare(settings, serial_map)
    assert verify.verify(VerifyConfig(tokens=settings.tokens, remake=99), serial_map)["remade"] == 6


def test_a_claim_may_be_deleted_and_taken_over(settings: PrepareConfig) -> None:
    with pytest.raises(Killed):
        prepare.prepare(settings, interrupted)
    uri = storage.join(settings.tokens, "preparation.json")
    storage.delete(uri)
    other = settings.model_copy(update={"views": 2})
    prepare.prepare(other, serial_map)
    assert json.loads(storage.read(uri))["views"] == 2
    storage.write(uri, b"{}")
    with pytest.raises(TokenStoreError, match=r"preparation\.json is damaged.* delete "):
        prepare.prepare(other, serial_map)


def test_a_preparation_that_lost_its_claim_does_not_commit(settings: PrepareConfig) -> None:
    """A server that ignores the condition of a write lets two preparations claim a root; the first must not commit."""
    uri = storage.join(settings.tokens, "preparation.json")

    def overwritten(tasks: Any, worker: Any, arguments: Any, pool: Any) -> Iterator[Any]:
        yield from serial_map(tasks, worker, arguments, pool)
        storage.write(uri, storage.read(uri).replace(b'"views": 1', b'"views": 2'))

    with pytest.raises(TokenStoreError, match="its views is 2, not 1"):
        prepare.prepare(settings, overwritten)
    assert not storage.exists(storage.join(settings.tokens, "manifest.json"))


def test_a_store_without_a_claim_is_opened_and_completed(settings: PrepareConfig) -> None:
    """Stores of earlier versions; and `verify --remove` keeps the claim."""
    report = prepare.prepare(settings, serial_map)
    claim = Path(settings.tokens, "preparation.json")
    removed = verify.verify(VerifyConfig(tokens=settings.tokens, remove=True), serial_map)
    assert removed["removed_files"] == 0
    assert claim.exists()
    claim.unlink()
    shard = TokenStore.open(settings.tokens).manifest.shards[0]
    Path(settings.tokens, shard.path).unlink()
    assert prepare.prepare(settings, serial_map)["manifest_sha256"] == report["manifest_sha256"]


def test_a_source_over_the_budget_may_be_repaired(settings: PrepareConfig, digit_images: str, tmp_path: Path) -> None:
    """Removing the unreadable files, as the error advises, changes the listing; the claim must not refuse that."""
    shutil.copytree(digit_images, tmp_path / "images")
    bad = tmp_path / "images/train/3/bad.png"
    bad.write_bytes(b"not an image")
    settings = settings.model_copy(update={"source": str(tmp_path / "images"), "budget": 0.0})
    with pytest.raises(SourceError, match="more than the budget"):
        prepare.prepare(settings, serial_map)
    bad.unlink()
    assert prepare.prepare(settings, serial_map)["images"] == 160


def test_the_claim_does_not_depend_on_the_place_of_the_source(settings: PrepareConfig, tmp_path: Path) -> None:
    shutil.copytree(settings.source, tmp_path / "copy")
    for source in (settings.source, str(tmp_path / "copy")):
        with pytest.raises(Killed):
            prepare.prepare(settings.model_copy(update={"source": source}), interrupted)
    assert preparation.Preparation.model_validate_json((tmp_path / "tokens/preparation.json").read_bytes()).views == 1
