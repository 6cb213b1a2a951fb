"""An object store that refuses, resets, cuts, loses and falls silent: the same bytes in the end, or a clear error soon.

Everything here runs in one process against a real S3 server behind a proxy of ours; test_flows_faults.py has the
cluster. Faults of disks are in test_full_disk.py, damage in test_damage.py, kills in test_kills.py.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Keyed
from faults import ANYTHING, FaultProxy, running, seeded

from igpt_ray import object_clients, object_store, storage
from igpt_ray.data import sources
from igpt_ray.data.config import PixelsConfig, PrepareConfig
from igpt_ray.data.mapper import serial_map
from igpt_ray.data.palette import Palette
from igpt_ray.data.prepare import prepare
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import StorageError
from igpt_ray.train import checkpoint, loop
from tests.data.test_layouts import LAYOUTS, everything, expected, tiny
from tests.train import test_loop as test_training

Through = Callable[[Sequence[str | None]], AbstractContextManager[FaultProxy]]


@pytest.fixture
def through(on_rclone: str, rclone_s3: Keyed, aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Through:
    """A block in which `storage` reaches the server of `on_rclone` through a proxy that fails as scheduled.

    Less silence, and shorter waits between attempts: what takes minutes with the usual numbers takes a second.
    """
    monkeypatch.setattr(object_clients, "READ_TIMEOUT", 0.4)
    monkeypatch.setattr(object_clients, "BACKOFF", 0.01)
    monkeypatch.setattr(object_clients, "MAX_BACKOFF", 0.2)

    @contextmanager
    def block(schedule: Sequence[str | None]) -> Iterator[FaultProxy]:
        proxy = FaultProxy(int(rclone_s3.endpoint.rsplit(":", 1)[1]), schedule)
        with running(proxy) as endpoint:
            aws(endpoint, rclone_s3.key, rclone_s3.secret)
            yield proxy
        aws(*rclone_s3)

    return block


def operations(place: str, folder: Path) -> dict[str, Callable[[], object]]:
    """Each way to use a file of 2000 bytes at `place`/file, with a result that tells whether it worked."""
    uri = storage.join(place, "file")
    (folder / "local").write_bytes(bytes(2000))

    def downloaded() -> int:
        storage.download(uri, folder / "copy")
        return (folder / "copy").stat().st_size

    return {
        "read": lambda: len(storage.read(uri)),
        "read_range": lambda: len(storage.read(uri, 500, 2000)),
        "walk": lambda: [entry.size for entry in storage.walk(place)],
        "exists": lambda: storage.exists(uri),
        "write": lambda: storage.write(uri, bytes(2000)),
        "write_new": lambda: storage.write_new(uri, bytes(2000)),
        "upload": lambda: storage.upload(folder / "local", uri),
        "download": downloaded,
    }


SILENCES = [pytest.param(fault, marks=pytest.mark.slow) for fault in ("hang", "stall 100", "stall 900")]


@pytest.mark.parametrize("fault", [*ANYTHING, *SILENCES])
def test_every_operation_survives_every_kind_of_fault(
    fault: str, through: Through, on_rclone: str, tmp_path: Path
) -> None:
    """Twice in a row the same fault, then health: what a healthy server answers, not less and not an error."""
    times = 1 if fault.startswith(("hang", "stall")) else 2
    storage.write(storage.join(on_rclone, "file"), bytes(2000))
    healthy = {name: call() for name, call in operations(on_rclone, tmp_path).items()}
    with through([]) as proxy:
        for name, call in operations(on_rclone, tmp_path).items():
            proxy.fail_next([fault] * times)
            assert call() == healthy[name], name
            # A read cannot do without the body; a write may be content with the beginning of its answer.
            wanted = times if name in ("read", "read_range") and fault != "cut 5000" else 1
            assert proxy.faults >= wanted, name


@pytest.mark.slow
def test_a_silent_server_is_an_error_of_every_operation(
    through: Through, on_rclone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts upon attempts: ten of ours around eleven of the client's, a minute each, were 110 minutes."""
    monkeypatch.setattr(object_clients, "RETRIES", 3)
    storage.write(storage.join(on_rclone, "file"), bytes(2000))
    with through([]) as proxy:
        endpoint = object_clients.s3_client().meta.endpoint_url
        for name, call in operations(on_rclone, tmp_path).items():
            proxy.fail_next(["hang"] * 100)
            with pytest.raises(
                StorageError, match=rf"{on_rclone}.*{endpoint}.*sent nothing for 0\.4 s, 3 times in a row"
            ):
                call()
            assert proxy.faults == 3, name


@pytest.mark.parametrize("fault", ["stall 900", "cut 100", "cut 900", "503", "reset"])
def test_a_fault_that_lasts_is_an_error_that_names_the_file(
    fault: str, through: Through, on_rclone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file, an empty listing, or a wait without an end."""
    monkeypatch.setattr(object_clients, "RETRIES", 3)
    storage.write(storage.join(on_rclone, "file"), bytes(2000))
    with through([]) as proxy:
        for start in (0, 5):
            proxy.fail_next([fault] * 100)
            with pytest.raises(StorageError, match=f"{on_rclone}/file"):
                storage.read(f"{on_rclone}/file", start)
            assert proxy.faults == 3


def test_multipart_uploads_and_downloads_survive_faults(
    through: Through, on_rclone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that waits for ever where the head of an answer was cut; parts that change places."""
    original = tmp_path / "original"
    original.write_bytes(os.urandom(1 << 16) * 144)
    monkeypatch.setattr(object_store, "PART", 1 << 20)
    with through(seeded(4, 10_000, 0.3, [*ANYTHING, "stall 300"])) as proxy:
        storage.upload(original, f"{on_rclone}/big")
        storage.download(f"{on_rclone}/big", tmp_path / "copy")
    assert proxy.faults >= 4
    assert (tmp_path / "copy").read_bytes() == original.read_bytes()


@pytest.mark.parametrize("fault", ["cut 100", "cut 300"])
def test_a_multipart_upload_survives_a_truncated_response(
    fault: str, through: Through, on_rclone: str, tmp_path: Path
) -> None:
    """obstore does not repeat the requests that begin and complete a multipart upload."""
    original = tmp_path / "original"
    original.write_bytes(bytes(9 << 20))
    with through([]) as proxy:
        for at in range(3):
            proxy.fail_next([None] * at + [fault])
            storage.upload(original, f"{on_rclone}/big")
            assert len(storage.read(f"{on_rclone}/big")) == 9 << 20


def test_storage_survives_faults(through: Through, on_rclone: str) -> None:
    with through(seeded(1, 10_000, 0.3)) as proxy:
        for i in range(12):
            data = os.urandom(3000 + i)
            storage.write(storage.join(on_rclone, str(i)), data)
            assert storage.read(storage.join(on_rclone, str(i))) == data
        assert len(list(storage.walk(on_rclone))) == 12
    assert proxy.faults > 5


# ------------------------------------------------------------------------------------------------ sources and stores


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planning_and_reading_every_layout_survive_faults(layout: str, through: Through, on_rclone: str) -> None:
    """A member, a row or a label that a cut answer swallowed; blocks read ahead fail in another thread."""
    LAYOUTS[layout](on_rclone, tiny())
    with through(seeded(3, 10_000, 0.25, [*ANYTHING, "stall 300", "hang"])) as proxy:
        assert set(everything(sources.plan(on_rclone, 3))) == expected(tiny())
    assert proxy.faults >= 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_source_that_stops_responding_is_an_error_in_every_layout(
    layout: str, through: Through, on_rclone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow and the threads that read ahead must hand on the error as it is: not a hang, not a damaged file."""
    LAYOUTS[layout](on_rclone, tiny())
    plan = sources.plan(on_rclone, 3)
    monkeypatch.setattr(object_clients, "RETRIES", 2)
    for fault in ("hang", "stall 300"):
        with through([fault] * 1000), pytest.raises(StorageError, match=on_rclone):
            everything(plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [("503",), ("reset", "drop"), ("cut 0", "cut 200", "cut 900"), ("lost",), ("hang", "stall 300")], ids=str
)
def test_a_preparation_with_one_kind_of_fault_writes_the_same_bytes(
    kinds: Sequence[str],
    through: Through,
    on_rclone: str,
    pictures: str,
    palette: Palette,
    tmp_path: Path,
) -> None:
    """Reading the pictures and writing shards, lists and manifest: some writes take effect without an answer."""
    for entry in storage.walk(pictures):
        storage.write(f"{on_rclone}/images{entry.uri.removeprefix(pictures)}", storage.read(entry.uri))
    palette.save(storage.join(on_rclone, "palette.npy"))

    def settings(source: str, tokens: str) -> PrepareConfig:
        return PrepareConfig(
            source=source,
            palette=storage.join(on_rclone, "palette.npy"),
            tokens=tokens,
            shard_images=4,
            budget=0.2,
            pixels=PixelsConfig(n_px=4),
        )

    prepare(settings(pictures, str(tmp_path / "tokens")), serial_map)
    started = time.monotonic()
    with through(seeded(5, 10_000, 0.2, kinds)) as proxy:
        prepare(settings(f"{on_rclone}/images", f"{on_rclone}/tokens"), serial_map)
    assert proxy.faults >= 5
    assert time.monotonic() - started < 60
    undisturbed = TokenStore.open(str(tmp_path / "tokens"))
    assert TokenStore.open(f"{on_rclone}/tokens").manifest.shards == undisturbed.manifest.shards
    for entry in storage.walk(undisturbed.root):
        if storage.name(entry.uri) != "manifest.json":  # whose settings name the places
            assert storage.read(f"{on_rclone}/tokens{entry.uri.removeprefix(undisturbed.root)}") == storage.read(
                entry.uri
            )


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_an_unavailable_store_costs_a_run_neither_steps_nor_its_last_checkpoint(
    process_group: None,
    through: Through,
    on_rclone: str,
    store: TokenStore,
    tmp_path: Path,
    seconds: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """503 from the first request of a checkpoint on: the steps do not wait, the next checkpoint is left out and said
    to be, and the last one is worth the wait."""
    if seconds == 60:
        monkeypatch.setattr(object_clients, "BACKOFF", 0.5)  # the defaults
        monkeypatch.setattr(object_clients, "MAX_BACKOFF", 20.0)
    cfg = test_training.settings_for(
        store, tmp_path, run={"root": on_rclone, "checkpoint_every": 2, "keep_every": None}
    )
    begun: list[float] = []

    def each_step() -> bool:
        begun.append(time.monotonic())
        while (done := len(begun) - 1) in (2, 4) and done not in checkpoint.committed_steps(cfg.run.uri):
            time.sleep(0.01)
        if done == 4:
            proxy.fail_next(["503"] * 100_000)
            threading.Timer(seconds, proxy.fail_next, [[]]).start()
        return False

    with through([]) as proxy, caplog.at_level(logging.WARNING):
        report = loop.train(cfg, torch.device("cpu"), each_step)
        ended = time.monotonic()
    assert begun[-1] - begun[5] < 2 <= seconds <= ended - begun[5]
    assert report["step"] == test_training.STEPS
    assert checkpoint.committed_steps(cfg.run.uri)[-1] == test_training.STEPS
    assert "no checkpoint at step 8: the previous one is still uploading" in caplog.text
    undisturbed = loop.train(test_training.settings_for(store, tmp_path, "undisturbed"), torch.device("cpu"))
    assert test_training.weights_of(report["run"]) == test_training.weights_of(undisturbed["run"])
