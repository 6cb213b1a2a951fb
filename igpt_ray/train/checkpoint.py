"""Checkpoints of a training run: sharded by torch DCP, committed by a manifest, verified before they are used.

    <run>/checkpoints/step_00001000/__0_0.distcp ...   one or more files per worker
    <run>/checkpoints/step_00001000/metadata           DCP's index (a pickle: its hash is checked before it is read)
    <run>/checkpoints/step_00001000/manifest.json      bytes and sha256 of the others, trainer state; written last

A folder without a manifest is not a checkpoint. A checkpoint whose files do not match its manifest is skipped with a
warning, in favour of the next older one. Every rank calls the functions that save and load, and uploads or downloads
only the files that hold its shards.
"""

import dataclasses
import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, WriteItemType
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from igpt_ray import artifact, storage
from igpt_ray.data.token_format import Strict
from igpt_ray.errors import CheckpointError, IgptError, StorageError
from igpt_ray.train.host_copy import HostCopy

log = logging.getLogger(__name__)

T = TypeVar("T")

METADATA = "metadata"
"""Stored without DCP's leading dot, so that listings show it."""
SET_ASIDE = "manifest.set-aside.json"
"""Name that `rewind` gives to the manifest of a later checkpoint."""
ATTEMPTS, PAUSE = 3, 5.0
"""Attempts to store each file, and seconds between them, in addition to the retries of `storage`."""


class File(Strict):
    name: str
    bytes: int
    sha256: str


class Manifest(Strict):
    step: int
    files: list[File]
    trainer: dict[str, Any]


def uri_of(run: str, step: int) -> str:
    return storage.join(run, "checkpoints", f"step_{step:08d}")


class Saver:
    """Saves checkpoints in the background: a thread writes, uploads and commits one copy of the state at a time.

    A checkpoint that is due while another is uploading is skipped with a warning, so that a slow store does not delay
    training. A save that fails is logged and does not affect the run. Every rank must create it and call its methods;
    the threads communicate over their own process group.
    """

    def __init__(self, run: str, keep: int = 0, keep_every: int | None = None):
        self.run, self.keep, self.keep_every = run, keep, keep_every
        self.group = dist.new_group(backend="gloo")
        self.copy = HostCopy()
        self.optimizer: Optimizer | None = None
        self.thread: threading.Thread | None = None
        self.failed: str | None = None
        """Why the last save was not committed; None if it was."""

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        trainer: dict[str, Any],
        before_commit: Callable[[], None] = lambda: None,
        must: bool = False,
    ) -> bool:
        """Start to save the state after `step` steps. Returns False if the save is skipped.

        Returns as soon as the state is copied, or on a CUDA device before: the next update by the optimizer waits for
        the copy on the device. Rank 0 calls `before_commit` before the commit. With `must`, the
        call waits for a save in progress instead of being skipped.
        """
        if must:
            self.wait()
        elif self._in_progress():
            if dist.get_rank() == 0:
                log.warning("no checkpoint at step %d: the previous one is still uploading", step)
            return False
        self.copy.update(_state(model, optimizer))
        if self.optimizer is not optimizer:
            optimizer.register_step_pre_hook(lambda *_: self.copy.protect())
            self.optimizer = optimizer
        self.failed = "it was never finished"
        self.thread = threading.Thread(target=self._store, args=(step, trainer, before_commit), daemon=True)
        self.thread.start()
        return True

    def wait(self) -> None:
        """Wait for a save in progress."""
        if self.thread is not None:
            self.thread.join()

    def finish(self) -> None:
        """Wait for the last save. Raises `StorageError` if it was not committed."""
        self.wait()
        if self.failed is not None:
            raise StorageError(
                f"the last checkpoint of {self.run} was not stored: {self.failed}; run the command again to repeat it"
            )

    def _in_progress(self) -> bool:
        """Whether a save is in progress on any rank, so that all ranks decide alike."""
        return any(_on_all_ranks(lambda: self.thread is not None and self.thread.is_alive()))

    def _store(self, step: int, trainer: dict[str, Any], before_commit: Callable[[], None]) -> None:
        try:
            self.copy.wait()
            self._commit(step, self._upload(step), trainer, before_commit)
            self.failed = None
        except (Exception, CheckpointException) as error:  # CheckpointException is not an Exception
            self.failed = " ".join(str(error).split())
            if dist.get_rank() == 0:
                log.warning("no checkpoint at step %d, training continues: %s", step, self.failed)

    def _upload(self, step: int) -> list[File]:
        """Upload this rank's files; returns the files of all ranks. Raises on every rank if one has failed."""
        uri = uri_of(self.run, step)
        with tempfile.TemporaryDirectory() as folder:
            dcp.save(self.copy.state, checkpoint_id=folder, process_group=self.group, planner=_Planner())
            uploads = _on_all_ranks(lambda: [_upload(p, uri) for p in sorted(Path(folder).iterdir())], self.group)
        return list(chain.from_iterable(uploads))

    def _commit(self, step: int, files: list[File], trainer: dict[str, Any], before_commit: Callable[[], None]) -> None:
        def commit() -> None:
            if dist.get_rank() == 0:
                _persist(before_commit)
                manifest = Manifest(step=step, files=files, trainer=trainer).model_dump_json(indent=1).encode()
                _persist(lambda: storage.write(storage.join(uri_of(self.run, step), "manifest.json"), manifest))

        _on_all_ranks(commit, self.group)
        if dist.get_rank() == 0 and self.keep:
            try:
                prune(self.run, self.keep, self.keep_every)
            except StorageError as error:
                log.warning("older checkpoints were not deleted: %s", error)


class _Planner(DefaultSavePlanner):
    """Stores unsharded tensors, which are small and needed by every rank, in rank 0's file."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        first, *others = all_plans
        sharded = [[item for item in plan.items if item.type == WriteItemType.SHARD] for plan in others]
        others = [dataclasses.replace(plan, items=items) for plan, items in zip(others, sharded, strict=True)]
        return super().create_global_plan([first, *others])


def load_newest(run: str, model: nn.Module, optimizer: Optimizer) -> Manifest | None:
    """Load the newest valid checkpoint into model and optimizer; returns None if the run has no checkpoint.

    Every rank must call it. Raises `CheckpointError` if all checkpoints are damaged.
    """
    committed = _on_all_ranks(lambda: committed_steps(run) if dist.get_rank() == 0 else [])[0]
    if not committed:
        return None
    state = _state(model, optimizer)
    for step in reversed(committed):
        try:
            manifest = _load(uri_of(run, step), state)
        except CheckpointError as error:
            if dist.get_rank() == 0:
                log.warning("skipped a damaged checkpoint: %s", error)
            continue
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        return manifest
    # A restart from step 0 would overwrite checkpoints that may be repairable.
    raise CheckpointError(f"all {len(committed)} checkpoints of {run} are damaged: choose another --run.name")


def _load(uri: str, state: dict[str, Any]) -> Manifest:
    """Load into `state`. An error of any rank is raised on every rank: `CheckpointError` if a file is damaged."""
    with tempfile.TemporaryDirectory() as folder:
        reader = _Reader(uri, Path(folder))
        _on_all_ranks(reader.open)
        try:
            dcp.load(state, storage_reader=reader)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
        assert reader.manifest is not None
        return reader.manifest


class _Reader(dcp.FileSystemReader):
    """Downloads and verifies the files that this rank reads, which are a small part of a checkpoint."""

    def __init__(self, uri: str, folder: Path):
        super().__init__(folder)
        self.uri, self.folder = uri, folder
        self.manifest: Manifest | None = None

    def open(self) -> None:
        uri = storage.join(self.uri, "manifest.json")
        messages = f"{uri} is missing", f"{uri} is damaged"
        self.manifest = artifact.load(uri, Manifest.model_validate_json, CheckpointError, *messages)
        self._fetch({METADATA})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        self._fetch({self.storage_data[item.storage_index].relative_path for item in plan.items})
        return super().read_data(plan, planner)

    def _fetch(self, names: set[str]) -> None:
        assert self.manifest is not None
        for file in self.manifest.files:
            if file.name in names:
                path = self.folder / (f".{METADATA}" if file.name == METADATA else file.name)
                artifact.download(storage.join(self.uri, file.name), path, file.sha256, CheckpointError)


def _on_all_ranks(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """The results of `work` on all ranks. If it fails on any rank, raise the first rank's error on every rank."""
    own: Any
    try:
        own = work()
    except IgptError as error:
        own = error
    except Exception as error:  # not every error of a library can be pickled
        own = RuntimeError(repr(error))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own, group)
    if failed := [each for each in gathered if isinstance(each, Exception)]:
        raise failed[0]
    return gathered


def rewind(run: str, step: int) -> None:
    """Make the checkpoint of `step` the newest. Later ones are set aside; their files are deleted by a later `prune`.

    Called on the driver before workers start. Raises `CheckpointError` if there is no checkpoint of `step`.
    """
    committed = committed_steps(run)
    if step not in committed:
        available = ", ".join(map(str, committed)) or "none"
        raise CheckpointError(f"{run} has no checkpoint of step {step} to resume from: available: {available}")
    for later in reversed(committed[committed.index(step) + 1 :]):  # newest first, so that a kill leaves a valid order
        uri = uri_of(run, later)
        log.warning("set aside: %s", uri)
        storage.write(storage.join(uri, SET_ASIDE), storage.read(storage.join(uri, "manifest.json")))
        storage.delete(storage.join(uri, "manifest.json"))


def prune(run: str, keep: int, keep_every: int | None = None) -> None:
    """Delete all but the `keep` newest committed checkpoints, and remains of interrupted saves and deletions.

    Checkpoints of every `keep_every`-th step are kept, as are files newer than the newest committed checkpoint, which
    may be in progress. Rank 0 only.
    """
    committed = committed_steps(run)
    kept = [s for i, s in enumerate(committed) if i >= len(committed) - keep or (keep_every and s % keep_every == 0)]
    old = [uri for step, uri in _files(run) if kept and step < kept[-1] and step not in kept]
    # Manifests first: a half-deleted checkpoint must not look whole.
    for uri in sorted(old, key=lambda uri: storage.name(uri) != "manifest.json"):
        storage.delete(uri)


def committed_steps(run: str) -> list[int]:
    """Steps with a manifest, ascending."""
    return sorted(step for step, uri in _files(run) if storage.name(uri) == "manifest.json")


def _files(run: str) -> list[tuple[int, str]]:
    """Step and URI of every file of every checkpoint, committed or not."""
    pattern = re.compile(r"/checkpoints/step_(\d{8})/[^/]+$")
    found = ((pattern.search(entry.uri), entry.uri) for entry in storage.walk(storage.join(run, "checkpoints")))
    return [(int(match[1]), uri) for match, uri in found if match]


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments}


def _persist(store: Callable[[], T]) -> T:
    """Repeat a store operation whose own retries failed, because a checkpoint is worth more than a minute's wait."""
    for attempt in range(1, ATTEMPTS):
        try:
            return store()
        except StorageError as error:
            log.warning("retrying in %g s (attempt %d of %d): %s", PAUSE, attempt + 1, ATTEMPTS, error)
            time.sleep(PAUSE)
    return store()


def _upload(path: Path, uri: str) -> File:
    name = path.name.lstrip(".")
    _persist(lambda: storage.upload(path, storage.join(uri, name)))
    return File(name=name, bytes=path.stat().st_size, sha256=artifact.sha256_of(path))
