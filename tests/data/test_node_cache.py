"""The cache of a node: damaged files are reported, rebuilt, and never read."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from igpt_ray.data import node_cache
from igpt_ray.errors import StorageError

SHAPE = (30, 64)
ARRAY = np.random.default_rng(3).integers(0, 1 << 16, SHAPE).astype(np.uint16)


def pieces() -> Iterator[np.ndarray]:
    yield ARRAY[:10]
    yield ARRAY[10:]


def nothing() -> Iterator[np.ndarray]:
    raise AssertionError("made again without need")


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "the first bit": flipped(0),
    "a bit in the middle": flipped(2000),
    "a bit of the hash": lambda data: flipped(len(data) - 5)(data),
    "cut by a byte": lambda data: data[:-1],
    "cut within the array": lambda data: data[:1000],
    "emptied": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "without its hash": lambda data: data[: 2 * ARRAY.size],
}


def test_an_existing_file_is_reused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "new" / "a.u16"
    np.testing.assert_array_equal(node_cache.mapped(path, SHAPE, pieces), ARRAY)
    np.testing.assert_array_equal(node_cache.mapped(path, SHAPE, nothing), ARRAY)
    assert not caplog.records


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_rebuilt(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disk may lose a bit or a block; a reader that has mapped the intact file is not affected."""
    path = tmp_path / "a.u16"
    before = node_cache.mapped(path, SHAPE, pieces)
    held = np.array(before)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(DAMAGES[damage](whole))
    with caplog.at_level(logging.WARNING):
        again = node_cache.mapped(path, SHAPE, pieces)
    assert f"{path} is damaged" in caplog.text
    np.testing.assert_array_equal(again, ARRAY)
    np.testing.assert_array_equal(before, held)
    assert path.read_bytes() == whole


def test_a_damaged_file_is_not_used_if_it_cannot_be_rebuilt(tmp_path: Path) -> None:
    """The store cannot be reached; an error is better than wrong tokens."""

    def away() -> Iterator[np.ndarray]:
        yield ARRAY[:10]
        raise StorageError("the bucket is away")

    path = tmp_path / "a.u16"
    node_cache.mapped(path, SHAPE, pieces)
    path.write_bytes(flipped(7)(path.read_bytes()))
    for _ in range(2):
        with pytest.raises(StorageError, match="away"):
            node_cache.mapped(path, SHAPE, away)
    assert [p.name for p in tmp_path.iterdir()] == ["a.lock"]


def _killed_half_way(path: Path) -> None:
    def dying() -> Iterator[np.ndarray]:
        yield ARRAY[:10]
        os.kill(os.getpid(), signal.SIGKILL)

    node_cache.mapped(path, SHAPE, dying)


def test_a_process_killed_during_a_write_leaves_no_readable_file(tmp_path: Path) -> None:
    """It leaves no lock and no permanent temporary file either."""
    path = tmp_path / "a.u16"
    child = multiprocessing.get_context("spawn").Process(target=_killed_half_way, args=(path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (tmp_path / "a.tmp").exists()
    np.testing.assert_array_equal(node_cache.mapped(path, SHAPE, pieces), ARRAY)
    assert {p.name for p in tmp_path.iterdir()} == {"a.u16", "a.lock"}


def test_a_folder_without_write_permission_is_a_clear_error(tmp_path: Path) -> None:
    """Instead of a traceback from `open`."""
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(StorageError, match=r"file/a\.u16"):
        node_cache.mapped(tmp_path / "file" / "a.u16", SHAPE, pieces)
