"""Checkpoints: a resumed run is bit-identical to an uninterrupted one; damaged checkpoints are skipped and named."""

import errno
import json
import logging
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model, random_tokens
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from igpt_ray import storage
from igpt_ray.errors import CheckpointError, StorageError
from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train import checkpoint, optim, parallelize
from igpt_ray.train.config import OptimConfig, WorkersConfig

MODERN = {"qk_norm": True, "rotary": True}

pytestmark = pytest.mark.usefixtures("process_group")


ROOT = Path(__file__).resolve().parents[2]


class Trainee:
    """A small network with its optimiser, plain or sharded as in a real run."""

    def __init__(self, seed: int, sharded: bool = False, modern: bool = False, device: torch.device | str = "cpu"):
        shape = {"n_layer": 2, **(MODERN if modern else {})}
        self.model: ImageGPT = random_model(seed, std=0.2, device=device, **shape).requires_grad_(True).train()
        if sharded:
            parallelize.shard(self.model, init_device_mesh(torch.device(device).type, (1,)), WorkersConfig())
        self.optimizer: Optimizer = optim.build(self.model, OptimConfig(lr=1e-2, muon_lr=0.02 if modern else None))

    def train(self, *steps: int) -> "Trainee":
        for step in steps:
            x = random_tokens(self.model, 4, seed=step)
            self.optimizer.zero_grad()
            losses.next_pixel(self.model(x), x).mean().backward()
            self.optimizer.step()
        return self

    def save(self, run: str, step: int) -> "Trainee":
        saver = checkpoint.Saver(run)
        self.begin(saver, step)
        saver.finish()
        return self

    def begin(self, saver: checkpoint.Saver, step: int, **more: Any) -> bool:
        return saver.save(step, self.model, self.optimizer, {"seed": 5, "step": step}, **more)

    def load(self, run: str) -> checkpoint.Manifest | None:
        return checkpoint.load_newest(run, self.model, self.optimizer)

    def state(self) -> dict[str, Tensor]:
        """Weights and Adam's moments by name."""
        weights, moments = get_state_dict(self.model, self.optimizer)
        found = dict(weights)
        for name, of_weight in moments["state"].items():
            found |= {f"{name}.{key}": value for key, value in of_weight.items()}
        return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in found.items()}


def equal(a: Trainee, b: Trainee) -> bool:
    one, other = a.state(), b.state()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("sharded", [False, True])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(device: torch.device, run: str, sharded: bool) -> None:
    """Including Adam's moments and its count of steps."""
    first = Trainee(1, sharded, device=device).train(0, 1, 2).save(run, 3)
    resumed = Trainee(2, sharded, device=device)
    assert not equal(first, resumed)
    manifest = resumed.load(run)
    assert manifest is not None
    assert (manifest.step, manifest.trainer) == (3, {"seed": 5, "step": 3})
    assert equal(first, resumed)
    assert sum(name.endswith("exp_avg_sq") for name in resumed.state()) == len(list(first.model.parameters()))
    assert equal(first.train(3, 4), resumed.train(3, 4))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_resumed_modern_run_is_bit_identical_too(device: torch.device, run: str, sharded: bool) -> None:
    """Including Muon's momentum, groups and rates."""
    first = Trainee(1, sharded, modern=True, device=device).train(0, 1, 2).save(run, 3)
    resumed = Trainee(2, sharded, modern=True, device=device)
    assert resumed.load(run) is not None
    assert equal(first, resumed)
    momenta = [name for name in resumed.state() if name.endswith(".momentum")]
    assert len(momenta) == 2 * 4
    assert [g["lr_ratio"] for g in resumed.optimizer.param_groups] == [2.0] * 4 + [1.0]
    assert equal(first.train(3, 4), resumed.train(3, 4))


def test_a_checkpoint_in_a_bucket_works_like_one_on_disk(place: str) -> None:
    """torch writes folders, which object stores do not have."""
    saved = Trainee(1).train(0).save(place, 1)
    names = [entry.uri[len(place) + 1 :] for entry in storage.walk(place)]
    assert sorted(names) == [f"checkpoints/step_00000001/{f}" for f in ("__0_0.distcp", "manifest.json", "metadata")]
    other = Trainee(2)
    assert other.load(place) is not None
    assert equal(saved, other)


def test_a_new_run_has_nothing_to_load(run: str) -> None:
    """The first start raises no error and changes no weight."""
    fresh = Trainee(1)
    assert fresh.load(run) is None
    assert equal(fresh, Trainee(1))
    assert checkpoint.committed_steps(run) == []


def test_the_newest_checkpoint_has_the_highest_step(device: torch.device, run: str) -> None:
    """Not the last name or time: step 9 is before step 10."""
    trainee = Trainee(1, device=device)
    for step in (9, 100, 10):
        trainee.train(step).save(run, step)
    assert checkpoint.committed_steps(run) == [9, 10, 100]
    found = Trainee(2, device=device).load(run)
    assert found is not None
    assert found.step == 100


def test_a_step_saved_again_replaces_the_first(run: str) -> None:
    """A run resumed from an older step overwrites a damaged checkpoint when it reaches its step."""
    Trainee(1).train(0).save(run, 5)
    damage(Path(checkpoint.uri_of(run, 5), "__0_0.distcp"))
    again = Trainee(1).train(0, 1).save(run, 5)
    other = Trainee(2)
    assert other.load(run) is not None
    assert equal(again, other)


# ------------------------------------------------------------------------------------------------ asynchronous saves


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_is_of_its_step_although_training_continues(device: torch.device, run: str, sharded: bool) -> None:
    """The upload thread must read a copy of the tensors. The second save reuses the memory of the first copy."""
    trainee, saver, stored = Trainee(1, sharded, device=device).train(0), checkpoint.Saver(run), threading.Event()
    for step in (1, 2):
        stored.clear()
        assert trainee.begin(saver, step, before_commit=stored.wait, must=True)
        expected = Trainee(1, sharded, device=device).train(*range(step))
        trainee.train(step)
        assert checkpoint.committed_steps(run) == list(range(1, step))  # the steps above did not wait for it
        stored.set()
        saver.finish()
        found = Trainee(2, sharded, device=device)
        manifest = found.load(run)
        assert manifest is not None
        assert manifest.step == step
        assert equal(found, expected)
        assert not equal(found, trainee)


def test_a_save_during_an_upload_is_skipped_unless_it_is_required(run: str, caplog: pytest.LogCaptureFixture) -> None:
    """With a store slower than the run, steps must not wait, and copies must not accumulate."""
    trainee, saver, stored = Trainee(1).train(0), checkpoint.Saver(run), threading.Event()
    assert trainee.begin(saver, 1, before_commit=stored.wait)
    with caplog.at_level(logging.WARNING):
        assert not trainee.begin(saver, 2)
    assert "no checkpoint at step 2: the previous one is still uploading" in caplog.text
    threading.Timer(0.3, stored.set).start()
    assert trainee.begin(saver, 3, must=True)
    saver.finish()
    assert checkpoint.committed_steps(run) == [1, 3]


def test_a_failed_save_is_retried_and_only_the_last_one_ends_the_run(
    run: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the thread must be logged, and must not end the run."""
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)
    Path(run).mkdir()
    blocked = Path(run, "checkpoints")
    blocked.write_text("not a folder")
    trainee, saver = Trainee(1).train(0), checkpoint.Saver(run)
    with caplog.at_level(logging.WARNING):
        assert trainee.begin(saver, 1)
        saver.wait()
    assert caplog.text.count("retrying in") == checkpoint.ATTEMPTS - 1
    assert f"no checkpoint at step 1, training continues: {run}" in caplog.text
    with pytest.raises(StorageError, match=r"the last checkpoint of .* was not stored: .*; run the command again"):
        saver.finish()

    monkeypatch.setattr(checkpoint, "PAUSE", 0.2)
    assert trainee.begin(saver, 2)
    blocked.unlink()  # within the pause, or before the first attempt
    saver.finish()
    assert checkpoint.committed_steps(run) == [2]


def test_a_full_temporary_folder_is_a_failed_save_too(
    run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch wraps errors of its writer in a class that is not an Exception."""
    monkeypatch.setattr(tempfile, "tempdir", "/proc/self/fdinfo")  # a folder in which nothing can be made
    with caplog.at_level(logging.WARNING):
        saver = checkpoint.Saver(run)
        assert Trainee(1).train(0).begin(saver, 1)
        saver.wait()
    assert "no checkpoint at step 1, training continues" in caplog.text
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(checkpoint.dcp, "save", partial(checkpoint.dcp.save, storage_writer=Full("/nowhere")))
    assert Trainee(1).train(0).begin(saver, 2)
    saver.wait()
    assert saver.failed is not None
    assert "No space left" in saver.failed
    assert checkpoint.committed_steps(run) == []


class Full(FileSystemWriter):
    """A writer with a full disk."""

    def write_data(self, *arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_after_a_kill_at_any_write_the_new_or_the_previous_checkpoint_loads(tmp_path: Path) -> None:
    """SIGKILL before each file is created, opened, renamed or removed: no partial checkpoint is loaded."""
    done = subprocess.run(
        [sys.executable, "tests/support/killed_saving.py", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *killed, undisturbed = (json.loads(line) for line in done.stdout.splitlines())
    assert undisturbed == ["", [2], 2, True]
    told = " ".join(before for before, *_ in killed)
    for file in ("__0_0.distcp", "metadata", "manifest.json"):
        assert f"os.rename /checkpoints/step_00000002/.{file}." in told
    assert "os.remove /checkpoints/step_00000001/manifest.json" in told  # pruning is killed too
    for before, committed, loaded, whole in killed:
        assert committed in ([1], [1, 2], [2]), before
        assert (loaded, whole) == (committed[-1], True), before


# ------------------------------------------------------------------------------------------------ what is damaged


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("name", ["__0_0.distcp", "metadata", "manifest.json"])
@pytest.mark.parametrize("harm", [damage, cut, Path.unlink], ids=["flipped", "cut", "deleted"])
def test_a_damaged_checkpoint_is_skipped_for_an_older_one_with_a_warning(
    run: str, name: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """It must neither be loaded nor end the run, and the warning points to a failing disk."""
    if (name, harm) == ("manifest.json", damage):
        harm = lambda path: path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha255"'))  # noqa: E731
    trainee = Trainee(1)
    older = Trainee(1).train(0).save(run, 1)
    trainee.train(0, 1).save(run, 2)
    harm(Path(checkpoint.uri_of(run, 2), name))
    other = Trainee(2)
    with caplog.at_level(logging.WARNING):
        manifest = other.load(run)
    assert manifest is not None
    assert manifest.step == 1
    assert equal(older, other)
    if (name, harm) != ("manifest.json", Path.unlink):  # without one it never was a checkpoint
        assert f"skipped a damaged checkpoint: {checkpoint.uri_of(run, 2)}/{name}" in caplog.text


def test_a_partial_checkpoint_is_ignored(run: str) -> None:
    """A worker may be killed between two files; torch would load the rest."""
    Trainee(1).train(0).save(run, 1)
    Path(checkpoint.uri_of(run, 1), "manifest.json").unlink()
    fresh = Trainee(2)
    assert fresh.load(run) is None
    assert equal(fresh, Trainee(2))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_restart(run: str, caplog: pytest.LogCaptureFixture) -> None:
    """It would overwrite checkpoints that might be repaired."""
    trainee = Trainee(1)
    for step in (1, 2):
        trainee.train(step).save(run, step)
        damage(Path(checkpoint.uri_of(run, step), "metadata"))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CheckpointError, match=r"all 2 checkpoints .* --run\.name"),
    ):
        Trainee(2).load(run)
    assert caplog.text.count("skipped a damaged checkpoint") == 2


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_the_pickled_index_is_not_opened_before_its_hash_is_verified(run: str, tmp_path: Path) -> None:
    """DCP reads its index with pickle."""
    Trainee(1).train(0).save(run, 1)
    Path(checkpoint.uri_of(run, 1), "metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        Trainee(2).load(run)
    assert not (tmp_path / "ran").exists()


def test_a_manifest_names_every_file_with_its_hash(run: str) -> None:
    """A file that is not listed is not verified."""
    Trainee(1).train(0).save(run, 1)
    folder = Path(checkpoint.uri_of(run, 1))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {f["name"] for f in manifest["files"]} == {p.name for p in folder.iterdir()} - {"manifest.json"}
    for file in manifest["files"]:
        assert file["bytes"] == (folder / file["name"]).stat().st_size
        assert len(file["sha256"]) == 64


# ------------------------------------------------------------------------------------------------ what is old


def steps_with_files(run: str) -> list[int]:
    return sorted({int(Path(entry.uri).parent.name.removeprefix("step_")) for entry in storage.walk(run)})


def save_fake(run: str, step: int, committed: bool = True) -> None:
    """Write the files of a checkpoint that pruning reads."""
    for name in ("__0_0.distcp", "metadata", *(["manifest.json"] if committed else [])):
        storage.write(storage.join(checkpoint.uri_of(run, step), name), b"1")


def test_pruning_keeps_the_newest_intact_checkpoints(place: str) -> None:
    """It removes the oldest ones, and not one too many."""
    for keep in (5, 2, 1):
        for step in (1, 2, 10, 9):
            save_fake(place, step)
        checkpoint.prune(place, keep)
        expected = [1, 2, 9, 10][-keep:]
        assert checkpoint.committed_steps(place) == expected == steps_with_files(place)
        assert len(list(storage.walk(place))) == 3 * len(expected)


def test_pruning_removes_the_files_of_killed_saves(run: str) -> None:
    """Killed saves and deletions leave gigabytes of files. Newer files may belong to a save in progress."""
    for step, committed in ((1, False), (2, True), (3, False), (4, True), (5, False)):
        save_fake(run, step, committed)
    checkpoint.prune(run, 1)
    assert steps_with_files(run) == [4, 5]
    assert checkpoint.committed_steps(run) == [4]


def test_pruning_keeps_multiples_of_keep_every(run: str) -> None:
    """These are the history of a run; the others are removed."""
    for step in range(10, 100, 10):
        save_fake(run, step)
    checkpoint.prune(run, 2, keep_every=30)
    assert checkpoint.committed_steps(run) == [30, 60, 80, 90] == steps_with_files(run)
    checkpoint.prune(run, 1, keep_every=30)
    assert checkpoint.committed_steps(run) == [30, 60, 90]


def test_resuming_from_an_older_step_sets_later_checkpoints_aside(place: str) -> None:
    """Otherwise the next resume would load them; deleted, a mistyped step would cost the run."""
    for step in (5, 10, 15):
        save_fake(place, step)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 to resume from: available: 5, 10, 15"):
        checkpoint.rewind(place, 7)
    checkpoint.rewind(place, 5)
    checkpoint.rewind(place, 5)
    assert checkpoint.committed_steps(place) == [5]
    assert steps_with_files(place) == [5, 10, 15]
    save_fake(place, 10)
    save_fake(place, 20)
    checkpoint.prune(place, 2)
    assert checkpoint.committed_steps(place) == [10, 20] == steps_with_files(place)


def test_pruning_a_run_without_checkpoints_deletes_nothing(run: str) -> None:
    """The first save of a run may be in progress."""
    save_fake(run, 1, committed=False)
    checkpoint.prune(run, 1)
    assert steps_with_files(run) == [1]
