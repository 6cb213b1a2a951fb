"""Every kind of damage to a token store is detected and named by `verify`, by the loader and by a repeated preparation.

The store is prepared and verified by the flows in one process.
"""

import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from igpt_ray import artifact
from igpt_ray.data import pixels, sources
from igpt_ray.data.config import PixelsConfig, PrepareConfig, VerifyConfig
from igpt_ray.data.loader import SplitCache
from igpt_ray.data.make_shard import MakeShard, tasks_of
from igpt_ray.data.mapper import serial_map
from igpt_ray.data.palette import Palette
from igpt_ray.data.prepare import prepare
from igpt_ray.data.token_store import TokenStore
from igpt_ray.data.verify import verify
from igpt_ray.errors import IgptError, PaletteError, SourceError, TokenStoreError

VICTIM = "train/00001-v0.parquet"


@pytest.fixture
def settings(pictures: str, palette: Palette, tmp_path: Path) -> PrepareConfig:
    """Settings of a store of four shards, two of which have an image in quarantine."""
    palette.save(str(tmp_path / "palette.npy"))
    return PrepareConfig(
        source=pictures,
        palette=str(tmp_path / "palette.npy"),
        tokens=str(tmp_path / "tokens"),
        shard_images=4,
        budget=0.2,
        pixels=PixelsConfig(n_px=4),
    )


@pytest.fixture
def tokens(settings: PrepareConfig) -> Path:
    prepare(settings, serial_map)
    return Path(settings.tokens)


# ------------------------------------------------------------------------------------------------ one shard


def flip(data: bytes, at: int, bit: int = 0) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def pages(data: bytes) -> Iterator[tuple[range, range, range]]:
    """Header, checksum (inside the header) and content of each column's single page."""
    with pq.ParquetFile(io.BytesIO(data)) as file:
        columns = [file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)]
    for column in columns:
        if column.has_dictionary_page:
            continue
        start, stop = column.data_page_offset, column.data_page_offset + column.total_compressed_size
        for body in range(start, stop):
            at = data.find(_varint(zlib.crc32(data[body:stop])), start, body)
            if at >= 0:
                yield range(start, body), range(at, at + 4), range(body, stop)
                break


def _varint(crc: int) -> bytes:
    """A 32-bit number in thrift's compact protocol: zigzag, seven bits per byte."""
    signed = crc - (1 << 32) if crc >> 31 else crc
    value = (signed << 1) ^ (signed >> 31)
    out = []
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def footer(data: bytes) -> range:
    length = int.from_bytes(data[-8:-4], "little")
    return range(len(data) - 8 - length, len(data) - 8)


def middle(places: range) -> int:
    return places[len(places) // 2]


DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "magic at the start": lambda data, _: flip(data, 1),
    "page header": lambda data, _: flip(data, next(pages(data))[0].start),
    "page checksum": lambda data, _: flip(data, next(pages(data))[1].start + 1),
    "page data": lambda data, _: flip(data, middle(next(pages(data))[2])),
    "a token": lambda data, _: flip(data, middle(list(pages(data))[-1][2])),
    "metadata": lambda data, _: flip(data, middle(footer(data))),
    "what it says of itself": lambda data, _: flip(data, data.index(b'"pipeline')),
    "length of the metadata": lambda data, _: flip(data, -8),
    "magic at the end": lambda data, _: flip(data, -1),
    "cut after the magic": lambda data, _: data[:4],
    "cut within a page": lambda data, _: data[: middle(next(pages(data))[2])],
    "cut before the metadata": lambda data, _: data[: footer(data).start],
    "cut within the metadata": lambda data, _: data[: middle(footer(data))],
    "cut by a byte": lambda data, _: data[:-1],
    "emptied": lambda data, _: b"",
    "zeros": lambda data, _: bytes(len(data)),
    "longer": lambda data, _: data + b"\0",
    "another whole shard": lambda _, other: other,
}


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_verify_and_the_loader_detect_every_kind_of_damage_to_a_shard(
    damage: str, tokens: Path, tmp_path: Path
) -> None:
    """Parquet's own checks detect only half of the cases."""
    victim = tokens / VICTIM
    whole = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(DAMAGES[damage](whole, (tokens / "train/00000-v0.parquet").read_bytes()))
        assert victim.read_bytes() != whole
    with pytest.raises(TokenStoreError, match=rf"1 problem.*{VICTIM}"):
        verify(VerifyConfig(tokens=str(tokens), remake=0), serial_map)
    for _ in range(2):
        with pytest.raises(IgptError, match=VICTIM):
            SplitCache(TokenStore.open(str(tokens)), "train", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.u16"))


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_a_repeated_preparation_repairs_every_kind_of_damage(
    damage: str, tokens: Path, settings: PrepareConfig
) -> None:
    """The store is damaged before its commit, when no manifest has a hash of the shard."""
    before = {path: path.read_bytes() for path in tokens.rglob("*") if path.is_file()}
    victim = tokens / VICTIM
    for committed in (True, False):
        if damage == "missing":
            victim.unlink()
        else:
            victim.write_bytes(DAMAGES[damage](before[victim], before[tokens / "train/00000-v0.parquet"]))
        if not committed:
            (tokens / "manifest.json").unlink()
        prepare(settings, serial_map)
        assert {path: path.read_bytes() for path in tokens.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["train", "quarantine"])
def test_no_flipped_bit_is_committed(folder: str, tokens: Path, settings: PrepareConfig) -> None:
    """A bit anywhere in a shard or its quarantine list, whether or not a reader would fail on it."""
    store = TokenStore.open(str(tokens))
    plan = sources.plan(settings.source, settings.shard_images)
    task = next(t for t in tasks_of(plan, 1) if t.unit.split == "train" and t.unit.name == "00001")
    make = MakeShard(settings.tokens, store.kind, settings.pixels, settings.holdout, committed={})
    victim = next((tokens / folder).glob("*00001-v0*"))
    whole = victim.read_bytes()
    for at in range(0, len(whole), 17):
        victim.write_bytes(flip(whole, at, at % 8))
        make(task)
        assert victim.read_bytes() == whole, f"byte {at}"


# ------------------------------------------------------------------------------------------------ manifest and palette


def test_every_flipped_bit_of_the_manifest_is_detected(tokens: Path) -> None:
    """A bit may change the name of a class, the split of a shard, or its view."""
    path = tokens / "manifest.json"
    whole = path.read_bytes()
    assert all(artifact.unseal(flip(whole, at, bit)) is None for at in range(len(whole)) for bit in range(8))
    for at in range(0, len(whole), 200):
        path.write_bytes(flip(whole, at, at % 8))
        with pytest.raises(TokenStoreError, match=r"manifest\.json is damaged.*repeat jobs/prepare\.py"):
            TokenStore.open(str(tokens))
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 80, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TokenStoreError, match=r"manifest\.json is damaged"):
            verify(VerifyConfig(tokens=str(tokens)), serial_map)


def test_a_damaged_manifest_is_written_again_by_a_repeat(tokens: Path, settings: PrepareConfig) -> None:
    """The error advises to delete the manifest; a repeat then reuses the shards."""
    path = tokens / "manifest.json"
    whole = path.read_bytes()
    written = (tokens / VICTIM).stat().st_mtime_ns
    path.write_bytes(flip(whole, 500))
    with pytest.raises(TokenStoreError, match="delete it and repeat"):
        prepare(settings, serial_map)
    path.unlink()
    prepare(settings, serial_map)
    assert path.read_bytes() == whole
    assert (tokens / VICTIM).stat().st_mtime_ns == written


def test_every_flipped_bit_of_the_palette_s_colours_is_detected(tokens: Path) -> None:
    """The padding of the header is not significant; the last bit of a colour is."""
    path = tokens / "palette.npy"
    whole = path.read_bytes()
    colours = TokenStore.open(str(tokens)).palette().colours
    complaints = []
    for at in range(len(whole)):
        path.write_bytes(flip(whole, at, at % 8))
        try:
            there = TokenStore.open(str(tokens)).palette().colours
        except (TokenStoreError, PaletteError) as error:
            complaints.append(str(error))
        else:
            np.testing.assert_array_equal(there, colours)
    assert all(str(path) in complaint for complaint in complaints)
    assert len(complaints) >= colours.nbytes
    for length in (0, 5, 60, 127, 128, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PaletteError, match=r"palette\.npy"):
            verify(VerifyConfig(tokens=str(tokens)), serial_map)


def test_remaking_a_shard_detects_an_image_replaced_by_another_of_the_same_size(
    tokens: Path, settings: PrepareConfig
) -> None:
    """A unit is identified by names and sizes, which are equal for all copies of the data."""
    picture = next(Path(settings.source, "train").rglob("0.png"))
    data = picture.read_bytes()
    other = pixels.png(np.zeros((9, 8, 3), np.uint8))
    picture.write_bytes(other + bytes(len(data) - len(other)))
    verify(VerifyConfig(tokens=str(tokens), remake=0), serial_map)
    with pytest.raises(TokenStoreError, match=r"1 of 4 rows differ from the source"):
        verify(VerifyConfig(tokens=str(tokens), remake=9), serial_map)


def test_an_image_repaired_without_a_change_of_size_leaves_the_quarantine(settings: PrepareConfig) -> None:
    """The repair of a flipped bit changes neither name nor size."""
    strict = settings.model_copy(update={"budget": 0.0})
    (Path(settings.source) / "test/dog/1.png").unlink()
    bad = Path(settings.source) / "train/dog/1.png"
    whole = pixels.png(np.zeros((9, 8, 3), np.uint8))
    bad.write_bytes(flip(whole, 60))
    with pytest.raises(SourceError, match=r"dog/1\.png.*repair or remove them"):
        prepare(strict, serial_map)
    kept = Path(settings.tokens) / "train/00000-v0.parquet"
    written = kept.stat().st_mtime_ns
    bad.write_bytes(whole)
    report = prepare(strict, serial_map)
    assert (report["images"], report["quarantined"]) == (12, 0)
    assert kept.stat().st_mtime_ns == written
