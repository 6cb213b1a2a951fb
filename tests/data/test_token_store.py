"""The token store: rows survive a round trip, a flipped bit is detected, and a store is committed once."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import listing_of, manifest_of

from igpt_ray import artifact, storage
from igpt_ray.data import token_store
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat, Tokens, TokenStore
from igpt_ray.errors import NotFound, PaletteError, TokenStoreError

UNIT = {"unit": "00003", "split": "train", "view": "1"}


@pytest.fixture
def rows(kind: TokenFormat) -> tuple[list[str], list[int], Tokens]:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, kind.n_vocab, (20, kind.n_positions)).astype(np.uint16)
    return [f"é/{i}.png" for i in range(20)], [i % 3 for i in range(20)], tokens


# ------------------------------------------------------------------------------------------------ one shard


def test_rows_survive_a_shard(rows: tuple[list[str], list[int], Tokens], kind: TokenFormat) -> None:
    """The order of rows, the type of labels, and the order and type of tokens are preserved."""
    keys, labels, tokens = rows
    table = token_store.parse(token_store.encode(keys, labels, tokens, kind, UNIT))
    assert table.column_names == ["key", "label", "tokens"]
    assert table["key"].to_pylist() == keys
    assert table["label"].to_pylist() == labels
    back = token_store.tokens_of(table)
    assert back.dtype == np.uint16
    np.testing.assert_array_equal(back, tokens)


def test_a_shard_describes_its_content(rows: tuple[list[str], list[int], Tokens], kind: TokenFormat) -> None:
    """A shard copied out of its store must still be understandable."""
    said = token_store.metadata(token_store.parse(token_store.encode(*rows, kind, UNIT)).schema)
    assert said == {"format": token_store.FORMAT, **kind.model_dump(), **UNIT}
    assert token_store.metadata(pa.table({"a": [1]}).schema) == {}


def test_a_shard_may_have_no_rows(kind: TokenFormat) -> None:
    """All images of a unit may be in quarantine."""
    none = np.zeros((0, kind.n_positions), np.uint16)
    table = token_store.parse(token_store.encode([], [], none, kind, UNIT))
    assert token_store.tokens_of(table).shape == none.shape
    assert table.schema.equals(token_store.parse(token_store.encode(["a"], [0], np.zeros((1, 16)), kind, UNIT)).schema)


def test_any_parquet_reader_can_read_the_columns(
    rows: tuple[list[str], list[int], Tokens], kind: TokenFormat, tmp_path: Path
) -> None:
    """Users must be able to read their data without this project."""
    keys, labels, tokens = rows
    path = tmp_path / "shard.parquet"
    path.write_bytes(token_store.encode(keys, labels, tokens, kind, UNIT))
    plain = pq.read_table(path, columns=["key", "label", "tokens"]).to_pylist()
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["key", "label", "tokens"]
    for i, row in enumerate(plain):
        assert (row["key"], row["label"]) == (keys[i], labels[i]) == (frame["key"][i], frame["label"][i])
        np.testing.assert_array_equal(row["tokens"], tokens[i])
        np.testing.assert_array_equal(frame["tokens"][i], tokens[i])


def test_equal_rows_give_equal_bytes(rows: tuple[list[str], list[int], Tokens], kind: TokenFormat) -> None:
    """A time or a path in the file would give a repeated task another hash."""
    keys, labels, tokens = rows
    first = token_store.encode(keys, labels, tokens, kind, UNIT)
    reversed_unit = dict(reversed(UNIT.items()))
    strided = np.asfortranarray(tokens.astype(np.int64))
    assert token_store.encode(list(keys), list(labels), strided, kind, reversed_unit) == first
    assert token_store.encode(keys[::-1], labels, tokens, kind, UNIT) != first


# ------------------------------------------------------------------------------------------------ a whole store


def test_a_store_returns_the_committed_rows(store: TokenStore, kind: TokenFormat, palette: Palette) -> None:
    """The rows are of the requested split and view, and the palette is that of the tokens."""
    opened = TokenStore.open(store.root)
    assert opened.manifest == store.manifest
    assert opened.sha256 == store.sha256 == hashlib.sha256(storage.read(store.root + "/manifest.json")).hexdigest()
    assert opened.kind == kind
    assert opened.palette().fingerprint == palette.fingerprint
    assert opened.manifest.splits == ["test", "train"]
    assert (opened.manifest.rows("train"), opened.manifest.views("train")) == (12, 2)
    assert (opened.manifest.rows("test"), opened.manifest.views("test")) == (3, 1)
    assert [len(table) for table in opened.read_split("train")] == [7, 5]
    tables = [opened.read(shard) for shard in opened.manifest.select("train", 1)]
    assert [token_store.metadata(t.schema)["view"] for t in tables] == ["1", "1"]


def test_every_flipped_byte_is_detected_and_its_file_named(store: TokenStore) -> None:
    """Parquet's own checks do not cover page headers, metadata and padding."""
    shard = store.manifest.shards[0]
    path = Path(store.root, shard.path)
    data = path.read_bytes()
    for position in [*range(0, len(data), 7), len(data) - 1]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(TokenStoreError, match=shard.path) as caught:
            store.read(shard)
        assert "delete it and repeat" in str(caught.value)
    path.write_bytes(data)
    assert store.read(shard).num_rows == shard.rows


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: b"", lambda d: d + b"\0"])
def test_a_truncated_or_longer_file_is_detected(store: TokenStore, change: object) -> None:
    """For example an interrupted upload."""
    shard = store.manifest.shards[-1]
    path = Path(store.root, shard.path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TokenStoreError, match=shard.path):
        store.read(shard)


def test_a_shard_replaced_by_another_valid_one_is_detected(store: TokenStore) -> None:
    """A copy of view 0 with the name of view 1 is valid Parquet."""
    first, second = (store.manifest.select("train", view)[0] for view in (0, 1))
    Path(store.root, second.path).write_bytes(Path(store.root, first.path).read_bytes())
    with pytest.raises(TokenStoreError, match=second.path):
        store.read(second)


def test_a_missing_shard_is_named(store: TokenStore) -> None:
    """It must not result in fewer rows without an error."""
    shard = store.manifest.shards[0]
    Path(store.root, shard.path).unlink()
    with pytest.raises(NotFound, match=shard.path):
        list(store.read_split("test"))


def test_the_error_of_an_unknown_split_lists_the_splits(store: TokenStore) -> None:
    """Instead of `max() arg is an empty sequence`."""
    for ask in (store.manifest.select, store.manifest.rows, store.manifest.views):
        with pytest.raises(TokenStoreError, match="no split 'val' in this token store: it has test, train"):
            ask("val")
    with pytest.raises(TokenStoreError, match="it has test, train"):
        list(store.read_split("val"))


def test_another_palette_in_the_store_is_an_error(store: TokenStore, palette: Palette) -> None:
    """Every image would have false colours."""
    Palette(palette.colours[::-1].copy()).save(storage.join(store.root, "palette.npy"))
    with pytest.raises(TokenStoreError, match="not the palette of its tokens"):
        store.palette()
    storage.write(storage.join(store.root, "palette.npy"), b"not a palette")
    with pytest.raises(PaletteError, match=r"palette\.npy"):
        store.palette()


# ------------------------------------------------------------------------------------------------ commits


def test_a_store_without_a_manifest_is_not_a_store(store: TokenStore) -> None:
    """Shards of a preparation that is still running are not a data set."""
    Path(store.root, "manifest.json").unlink()
    with pytest.raises(TokenStoreError, match=r"no token store is committed at .*: run jobs/prepare\.py"):
        TokenStore.open(store.root)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"rows"', '"rowz"'),
        lambda text: text.replace(token_store.FORMAT, "igpt_ray tokens 2"),
        lambda text: json.dumps(json.loads(text) | {"surprise": 1}),
    ],
    ids=["cut", "misspelt", "another version", "foreign field"],
)
def test_a_manifest_with_other_fields_is_an_error(store: TokenStore, change: object) -> None:
    """Unknown fields are not ignored, and missing ones have no default. The checksum is valid."""
    path = Path(store.root, "manifest.json")
    text = artifact.unseal(path.read_bytes()).decode()
    path.write_bytes(artifact.seal(change(text)))
    with pytest.raises(TokenStoreError, match=r"version: |this version reads"):
        TokenStore.open(store.root)


def test_a_manifest_is_plain_json(store: TokenStore) -> None:
    """Other programs must be able to read it despite the checksum."""
    said = json.loads(Path(store.root, "manifest.json").read_bytes())
    assert len(said.pop("sha256")) == 64
    assert said == store.manifest.model_dump(mode="json")


def test_a_repeated_commit_changes_nothing(store: TokenStore) -> None:
    """A retry of the commit must not fail, nor replace the time of the first."""
    before = storage.read(store.root + "/manifest.json")
    later = store.manifest.model_copy(update={"made_by": {"by": "the same, an hour later"}})
    assert token_store.commit(store.root, later).sha256 == store.sha256
    assert storage.read(store.root + "/manifest.json") == before


@pytest.mark.parametrize("what", ["shards", "kind"])
def test_a_commit_over_another_store_is_an_error(store: TokenStore, what: str) -> None:
    """The second of two preparations into one folder would replace the first during a training run."""
    m = store.manifest
    other = {"shards": m.shards[:-1]} if what == "shards" else {"kind": m.kind.model_copy(update={"pipeline": "x-1"})}
    before = storage.read(store.root + "/manifest.json")
    with pytest.raises(TokenStoreError, match="another token store was committed"):
        token_store.commit(store.root, m.model_copy(update=other))
    assert storage.read(store.root + "/manifest.json") == before


def test_a_store_in_a_bucket_works_like_one_on_disk(
    place: str, kind: TokenFormat, rows: tuple[list[str], list[int], Tokens]
) -> None:
    """No code may use os.path on a URI."""
    data = token_store.encode(*rows, kind, UNIT)
    storage.write(storage.join(place, "train/00000-v0.parquet"), data)
    token_store.commit(place, manifest_of(kind, [listing_of("train/00000-v0.parquet", "train", 0, 20, data)]))
    (table,) = TokenStore.open(place + "/").read_split("train")
    assert table.equals(pq.read_table(io.BytesIO(data)))
