"""Full disks: small tmpfs file systems, mounted for a test. Needs the permission to mount."""

import logging
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_ray import storage
from igpt_ray.data import node_cache, pixels
from igpt_ray.data.config import PixelsConfig, PrepareConfig
from igpt_ray.data.loader import SplitCache
from igpt_ray.data.mapper import serial_map
from igpt_ray.data.palette import Palette
from igpt_ray.data.prepare import prepare
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import StorageError
from igpt_ray.train import checkpoint, loop
from tests.train import test_loop as test_training


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of 256 KiB, or of the size in the test's parameter."""
    size = getattr(request, "param", "256k")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def leave(disk: Path, n_bytes: int) -> Path:
    """Fill the disk up to about this many free bytes."""
    ballast = disk / ".ballast"
    free = storage.shutil.disk_usage(disk).free
    ballast.write_bytes(bytes(max(0, free - n_bytes)))
    return ballast


@pytest.fixture
def many_pictures(tmp_path: Path) -> str:
    """120 noisy 32x32 images, whose tokens do not compress: 2 KiB each."""
    rng = np.random.default_rng(6)
    for i in range(120):
        data = pixels.png(rng.integers(0, 256, (32, 32, 3), np.uint8))
        storage.write(str(tmp_path / "pictures/train/noise" / f"{i:03d}.png"), data)
    return str(tmp_path / "pictures")


def test_a_preparation_on_a_full_disk_is_an_error_and_a_repeat_completes(
    many_pictures: str, disk: Path, tmp_path: Path
) -> None:
    """The error names the file, the bytes needed and the bytes free. No partial file remains."""
    colours = np.random.default_rng(7).uniform(-1, 1, (512, 3)).astype(np.float32)
    Palette(colours).save(str(tmp_path / "palette.npy"))
    settings = PrepareConfig(
        source=many_pictures,
        palette=str(tmp_path / "palette.npy"),
        tokens=str(disk / "tokens"),
        shard_images=20,
        pixels=PixelsConfig(n_px=32, crop="centre"),
    )
    undisturbed = settings.model_copy(update={"tokens": str(tmp_path / "undisturbed")})
    prepare(undisturbed, serial_map)

    ballast = leave(disk, 124 << 10)
    with pytest.raises(StorageError, match=r"tokens/train/0000\d-v0\.parquet: its disk is full: \d+ bytes are free"):
        prepare(settings, serial_map)
    written = {path: path.stat().st_mtime_ns for path in (disk / "tokens").rglob("*.parquet")}
    assert 0 < len(written) < 6
    assert not list(storage.leftovers(settings.tokens))
    with pytest.raises(StorageError, match="free space and repeat"):
        prepare(settings, serial_map)

    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    prepare(settings, serial_map)
    store, expected = TokenStore.open(settings.tokens), TokenStore.open(undisturbed.tokens)
    assert store.manifest.shards == expected.manifest.shards
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


@pytest.mark.parametrize("how", ["write", "write_new", "upload", "download"])
def test_a_failed_write_to_a_full_disk_changes_no_existing_file(
    how: str, store: TokenStore, disk: Path, tmp_path: Path
) -> None:
    """A committed store on the same disk still verifies, and the old file is unchanged."""
    root = str(disk / "tokens")
    for entry in storage.walk(store.root):
        storage.write(root + entry.uri.removeprefix(store.root), storage.read(entry.uri))
    target, source = disk / "tokens" / "file", tmp_path / "source"
    source.write_bytes(bytes(100_000))
    if how != "write_new":
        target.write_bytes(b"old")
    leave(disk, 8 << 10)
    calls = {
        "write": lambda: storage.write(str(target), source.read_bytes()),
        "write_new": lambda: storage.write_new(str(target), source.read_bytes()),
        "upload": lambda: storage.upload(source, str(target)),
        "download": lambda: storage.download(str(source), target),
    }
    with pytest.raises(StorageError, match=rf"{target}: its disk is full: \d+ bytes are free, 100000 bytes are needed"):
        calls[how]()
    assert target.exists() == (how != "write_new")
    assert how == "write_new" or target.read_bytes() == b"old"
    assert not list(storage.leftovers(root))
    there = TokenStore.open(root)
    assert all(there.read(shard).num_rows == shard.rows for shard in there.manifest.shards)


def test_a_disk_too_small_for_the_cache_is_an_error_before_the_download(store: TokenStore, disk: Path) -> None:
    """The error comes before the download; with enough space the cache is built."""
    ballast = leave(disk, 100)
    with pytest.raises(
        StorageError, match=r"train-v0\.u16: its disk is full: \d+ bytes are free, 384 bytes are needed"
    ):
        SplitCache(store, "train", disk / "cache")
    ballast.unlink()
    assert len(SplitCache(store, "train", disk / "cache")) == 12


def test_a_disk_that_fills_during_the_download_leaves_no_partial_cache(disk: Path) -> None:
    """Another process fills the disk meanwhile."""
    array = np.ones((40, 1000), np.uint16)

    def pieces() -> Iterator[np.ndarray]:
        yield array[:20]
        leave(disk, 0)
        yield array[20:]

    path = disk / "a.u16"
    with pytest.raises(StorageError, match=r"a\.u16: its disk is full: \d+ bytes are free, 80000 bytes are needed"):
        node_cache.mapped(path, array.shape, pieces)
    assert {p.name for p in disk.iterdir()} == {".ballast", "a.lock"}
    (disk / ".ballast").unlink()
    np.testing.assert_array_equal(node_cache.mapped(path, array.shape, lambda: iter([array])), array)


@pytest.mark.parametrize("disk", ["2m"], indirect=True)
def test_a_disk_that_fills_during_a_run_costs_a_checkpoint_and_no_step(
    process_group: None,
    disk: Path,
    store: TokenStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The previous checkpoint stays intact, and the next save ignores the partial one."""
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)
    cfg = test_training.settings_for(store, disk, run={"log_every": 4})
    steps = 0

    def each_step() -> bool:
        nonlocal steps
        steps += 1
        while steps == 5 and checkpoint.committed_steps(cfg.run.uri) != [4]:
            time.sleep(0.01)
        while steps == 9 and "no checkpoint at step 8" not in caplog.text:
            time.sleep(0.01)
        if steps == 5:
            leave(disk, 3000)
        if steps == 9:
            assert checkpoint.committed_steps(cfg.run.uri) == [4]
            (disk / ".ballast").unlink()
        return False

    with caplog.at_level(logging.WARNING):
        report = loop.train(cfg, torch.device("cpu"), each_step)
    assert re.search(
        r"no checkpoint at step 8, training continues: .*/step_00000008/\w+: its disk is full", caplog.text
    )
    assert checkpoint.committed_steps(cfg.run.uri) == [4, 12]
    assert report["step"] == 12
