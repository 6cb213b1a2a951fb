"""Checkpoints: a resumed run is bit-equal to one that never stopped, and what is damaged is passed over and named."""

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

    def __init__(self, seed: int, sharded: bool = False, modern: bool = False):
        shape = {"n_layer": 2, **(MODERN if modern else {})}
        self.model: ImageGPT = random_model(seed, std=0.2, **shape).requires_grad_(True).train()
        if sharded:
            parallelize.shard(self.model, init_device_mesh("cpu", (1,)), WorkersConfig())
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
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(run: str, sharded: bool) -> None:
    """Moments that start at zero again, or Adam's count of steps: the loss jumps at every resume."""
    first = Trainee(1, sharded).train(0, 1, 2).save(run, 3)
    resumed = Trainee(2, sharded)
    assert not equal(first, resumed)
    manifest = resumed.load(run)
    assert manifest is not None
    assert (manifest.step, manifest.trainer) == (3, {"seed": 5, "step": 3})
    assert equal(first, resumed)
    assert sum(name.endswith("exp_avg_sq") for name in resumed.state()) == len(list(first.model.parameters()))
    assert equal(first.train(3, 4), resumed.train(3, 4))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_modern_run_resumes_bit_equal_too(run: str, sharded: bool) -> None:
    """Muon's momentum lost, or its groups and rates mixed up with Adam's."""
    first = Trainee(1, sharded, modern=True).train(0, 1, 2).save(run, 3)
    resumed = Trainee(2, sharded, modern=True)
    assert resumed.load(run) is not None
    assert equal(first, resumed)
    momenta = [name for name in resumed.state() if name.endswith(".momentum")]
    assert len(momenta) == 2 * 4
    assert [g["lr_ratio"] for g in resumed.optimizer.param_groups] == [2.0] * 4 + [1.0]
    assert equal(first.train(3, 4), resumed.train(3, 4))


def test_a_checkpoint_lives_in_a_bucket_as_it_does_on_disk(place: str) -> None:
    """torch writes folders; object stores have none, and hide names that begin with a dot."""
    saved = Trainee(1).train(0).save(place, 1)
    names = [entry.uri[len(place) + 1 :] for entry in storage.walk(place)]
    assert sorted(names) == [f"checkpoints/step_00000001/{f}" for f in ("__0_0.distcp", "manifest.json", "metadata")]
    other = Trainee(2)
    assert other.load(place) is not None
    assert equal(saved, other)


def test_a_new_run_has_nothing_to_load(run: str) -> None:
    """An exception on the first start, or a network half overwritten."""
    fresh = Trainee(1)
    assert fresh.load(run) is None
    assert equal(fresh, Trainee(1))
    assert checkpoint.committed_steps(run) == []


def test_the_newest_is_found_by_its_number(run: str) -> None:
    """Sorting names, or times: step 9 after step 10."""
    trainee = Trainee(1)
    for step in (9, 100, 10):
        trainee.train(step).save(run, step)
    assert checkpoint.committed_steps(run) == [9, 10, 100]
    found = Trainee(2).load(run)
    assert found is not None
    assert found.step == 100


def test_a_step_saved_again_replaces_the_first(run: str) -> None:
    """A run resumed from an older step reaches the number of a damaged checkpoint, and writes over it."""
    Trainee(1).train(0).save(run, 5)
    damage(Path(checkpoint.uri_of(run, 5), "__0_0.distcp"))
    again = Trainee(1).train(0, 1).save(run, 5)
    other = Trainee(2)
    assert other.load(run) is not None
    assert equal(again, other)


# ------------------------------------------------------------------------------------------------ beside the steps


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_is_of_its_step_though_training_goes_on(run: str, sharded: bool) -> None:
    """Tensors that are handed to a thread and not copied: half of this step, half of the next. The memory of the
    first copy serves the second."""
    trainee, saver, stored = Trainee(1, sharded).train(0), checkpoint.Saver(run), threading.Event()
    for step in (1, 2):
        stored.clear()
        assert trainee.begin(saver, step, before_commit=stored.wait, must=True)
        expected = Trainee(1, sharded).train(*range(step))
        trainee.train(step)
        assert checkpoint.committed_steps(run) == list(range(1, step))  # the steps above did not wait for it
        stored.set()
        saver.finish()
        found = Trainee(2, sharded)
        manifest = found.load(run)
        assert manifest is not None
        assert manifest.step == step
        assert equal(found, expected)
        assert not equal(found, trainee)


def test_a_save_whose_turn_comes_too_early_is_left_out_and_one_that_must_be_waits(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A store slower than the run: steps that wait for it, or copies that pile up in memory."""
    trainee, saver, stored = Trainee(1).train(0), checkpoint.Saver(run), threading.Event()
    assert trainee.begin(saver, 1, before_commit=stored.wait)
    with caplog.at_level(logging.WARNING):
        assert not trainee.begin(saver, 2)
    assert "no checkpoint at step 2: the previous one is still uploading" in caplog.text
    threading.Timer(0.3, stored.set).start()
    assert trainee.begin(saver, 3, must=True)
    saver.finish()
    assert checkpoint.committed_steps(run) == [1, 3]


def test_a_failed_save_is_tried_again_and_ends_nothing_but_the_last_one(
    run: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in a thread is seen by nobody; one that ends the run costs the steps since the last checkpoint."""
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


def test_a_full_disk_under_the_temporary_folder_is_a_failed_save_too(
    run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch wraps what its writer raises into something that is not even an Exception."""
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
    """A writer whose disk is full."""

    def write_data(self, *arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_killed_at_any_write_a_save_leaves_the_one_before_or_itself(tmp_path: Path) -> None:
    """SIGKILL before every file that is made, opened, renamed or removed: nothing torn is ever loaded."""
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
def test_a_damaged_checkpoint_is_passed_over_for_the_older_one(
    run: str, name: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Loaded, it ruins the run; raised, it ends it; passed over in silence, nobody looks at the disk."""
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


def test_a_torn_checkpoint_is_none(run: str) -> None:
    """A worker killed between two files: torch itself would load what is there."""
    Trainee(1).train(0).save(run, 1)
    Path(checkpoint.uri_of(run, 1), "manifest.json").unlink()
    fresh = Trainee(2)
    assert fresh.load(run) is None
    assert equal(fresh, Trainee(2))


def test_where_all_are_damaged_the_run_does_not_begin_anew(run: str, caplog: pytest.LogCaptureFixture) -> None:
    """It would overwrite what may yet be mended, after days of training perhaps."""
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
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_the_pickled_index_is_not_opened_before_its_hash_is_checked(run: str, tmp_path: Path) -> None:
    """DCP reads its index with plain pickle."""
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
    """The files of a checkpoint, as far as pruning looks at them."""
    for name in ("__0_0.distcp", "metadata", *(["manifest.json"] if committed else [])):
        storage.write(storage.join(checkpoint.uri_of(run, step), name), b"1")


def test_pruning_keeps_the_newest_whole(place: str) -> None:
    """Deleting from the wrong end, or one too many."""
    for keep in (5, 2, 1):
        for step in (1, 2, 10, 9):
            save_fake(place, step)
        checkpoint.prune(place, keep)
        expected = [1, 2, 9, 10][-keep:]
        assert checkpoint.committed_steps(place) == expected == steps_with_files(place)
        assert len(list(storage.walk(place))) == 3 * len(expected)


def test_pruning_removes_what_was_left_behind(run: str) -> None:
    """A killed save or deletion leaves gigabytes that nothing names any more. What is newer may be under way."""
    for step, committed in ((1, False), (2, True), (3, False), (4, True), (5, False)):
        save_fake(run, step, committed)
    checkpoint.prune(run, 1)
    assert steps_with_files(run) == [4, 5]
    assert checkpoint.committed_steps(run) == [4]


def test_pruning_keeps_every_so_many_for_ever(run: str) -> None:
    """The history of a run, one checkpoint of ten: deleted with the others, or the others kept with it."""
    for step in range(10, 100, 10):
        save_fake(run, step)
    checkpoint.prune(run, 2, keep_every=30)
    assert checkpoint.committed_steps(run) == [30, 60, 80, 90] == steps_with_files(run)
    checkpoint.prune(run, 1, keep_every=30)
    assert checkpoint.committed_steps(run) == [30, 60, 90]


def test_rewinding_sets_later_ones_aside(place: str) -> None:
    """Left as they are, the next resume takes the end that was given up; deleted, a mistyped step costs the run."""
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
    """The first save of a run is under way."""
    save_fake(run, 1, committed=False)
    checkpoint.prune(run, 1)
    assert steps_with_files(run) == [1]
