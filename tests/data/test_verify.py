"""A token store is checked to the last bit, and against its source."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from igpt_ray import artifact, storage
from igpt_ray.data import pixels, prepare, token_store, verify
from igpt_ray.data.config import PixelsConfig, PrepareConfig, VerifyConfig
from igpt_ray.data.mapper import serial_map
from igpt_ray.data.token_store import Manifest, TokenStore, tokens_of
from igpt_ray.errors import TokenStoreError

PIXELS = PixelsConfig(n_px=8, crop="centre")


@pytest.fixture
def tokens(prepared: str, digit_images: str, tmp_path: Path) -> Path:
    """A store of its own, with its source beside it."""
    shutil.copytree(digit_images, tmp_path / "images")
    prepare.prepare(
        PrepareConfig(
            source=str(tmp_path / "images"),
            palette=storage.join(prepared, "palette.npy"),
            tokens=str(tmp_path / "tokens"),
            shard_images=50,
            pixels=PIXELS,
        ),
        serial_map,
    )
    return tmp_path / "tokens"


def test_a_whole_store_passes_and_foreign_files_are_removed_only_when_asked(tokens: Path) -> None:
    stray = [tokens / "train/00099-v0.parquet", tokens / "quarantine/train-00099-v0.json"]
    stray.append(tokens / "train/.00001-v0.parquet.k2_x9abc")  # a killed write's
    for path in stray:
        path.write_bytes(b"left over")
    mine = tokens / "notes.txt"
    mine.write_text("somebody's")
    report = verify.verify(VerifyConfig(tokens=str(tokens), remake=9), serial_map)
    assert (report["shards"], report["images"], report["unnamed_files"]) == (4, 160, 3)
    assert all(path.exists() for path in stray)
    report = verify.verify(VerifyConfig(tokens=str(tokens), remove=True), serial_map)
    assert report["removed_files"] == 3
    assert not any(path.exists() for path in stray)
    assert mine.exists()
    TokenStore.open(str(tokens)).read(TokenStore.open(str(tokens)).manifest.shards[0])


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damage_is_found_and_the_file_named(tokens: Path, damage: Callable[[Path], None]) -> None:
    victim = tokens / "train/00001-v0.parquet"
    damage(victim)
    with pytest.raises(TokenStoreError, match=r"1 problem.*train/00001-v0\.parquet.*repeat jobs/prepare\.py"):
        verify.verify(VerifyConfig(tokens=str(tokens), remake=0), serial_map)


def recommit(tokens: Path, change: Callable[[np.ndarray, list[int], list[str]], None]) -> None:
    """Rewrite the first test shard after `change`, with a manifest that agrees: only its content is wrong."""
    store = TokenStore.open(str(tokens))
    first = store.manifest.shards[0]
    table = store.read(first)
    values, labels, keys = tokens_of(table).copy(), table["label"].to_pylist(), table["key"].to_pylist()
    change(values, labels, keys)
    said = {k: v for k, v in token_store.metadata(table.schema).items() if k in ("unit", "split", "view", "source")}
    data = token_store.encode(keys, labels, values, store.kind, said)
    (tokens / first.path).write_bytes(data)
    again = first.model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    manifest = store.manifest.model_copy(update={"shards": [again, *store.manifest.shards[1:]]})
    (tokens / "manifest.json").write_bytes(artifact.seal(Manifest.model_dump_json(manifest)))


def test_wrong_tokens_labels_and_keys_are_found_even_if_every_hash_agrees(tokens: Path) -> None:
    """A store written by faulty code: the hashes are of the faulty bytes."""

    def change(values: np.ndarray, labels: list[int], keys: list[str]) -> None:
        values[0, 0] = 99
        labels[1] = 77
        keys[2] = keys[3]

    recommit(tokens, change)
    with pytest.raises(TokenStoreError, match=r"token 99 in a palette of 16.*labels 0 to 77.*a key occurs twice"):
        verify.verify(VerifyConfig(tokens=str(tokens), remake=0), serial_map)


def test_tokens_that_the_source_does_not_give_are_found(tokens: Path) -> None:
    def change(values: np.ndarray, labels: list[int], keys: list[str]) -> None:
        values[4] = (values[4] + 1) % 16

    recommit(tokens, change)
    verify.verify(VerifyConfig(tokens=str(tokens), remake=0), serial_map)
    with pytest.raises(TokenStoreError, match=r"1 of 40 rows differ from the source"):
        verify.verify(VerifyConfig(tokens=str(tokens), remake=4), serial_map)


def test_a_source_that_has_changed_is_said_to_have(tokens: Path) -> None:
    picture = next((tokens.parent / "images/test").rglob("*.png"))
    picture.write_bytes(pixels.png(np.zeros((300, 300, 3), np.uint8)))
    with pytest.raises(TokenStoreError, match="the source has changed since"):
        verify.verify(VerifyConfig(tokens=str(tokens), remake=4), serial_map)
