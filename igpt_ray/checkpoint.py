"""Checkpoints of a training run: sharded by torch DCP, committed by a manifest, verified before they are used.

    <run>/checkpoints/step_00001000/__0_0.distcp ...   one or more files per worker
    <run>/checkpoints/step_00001000/metadata           DCP's index (a pickle: its hash is checked before it is read)
    <run>/checkpoints/step_00001000/manifest.json      bytes and sha256 of the others, trainer state; written last

A folder without a manifest is not a checkpoint. One whose files do not match its manifest is passed over for the
next older one, and said so. Every function here is called by all workers together.
"""

import hashlib
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from igpt_ray import storage
from igpt_ray.errors import CheckpointError, NotFound
from igpt_ray.shards import Strict

log = logging.getLogger(__name__)

METADATA = "metadata"
"""Stored without DCP's leading dot, so that listings show it."""


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


def save(run: str, step: int, model: nn.Module, optimizer: Optimizer, trainer: dict[str, Any]) -> None:
    """Write and commit the state after `step` steps."""
    uri = uri_of(run, step)
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(_state(model, optimizer), checkpoint_id=folder)
        mine = [_upload(path, uri) for path in sorted(Path(folder).iterdir())]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        manifest = Manifest(step=step, files=[f for files in everyone for f in files], trainer=trainer)
        storage.write(storage.join(uri, "manifest.json"), manifest.model_dump_json(indent=1).encode())
    dist.barrier()


def load_newest(run: str, model: nn.Module, optimizer: Optimizer) -> Manifest | None:
    """Load the newest checkpoint that verifies into model and optimizer; None if the run has committed none.

    Raises `CheckpointError` if it has, and all are damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        chosen = [_fetch_newest(run, Path(folder)) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(chosen)
        manifest = chosen[0]
        if manifest is None:
            return None
        if dist.get_rank() != 0:
            _fetch(uri_of(run, manifest.step), Path(folder))
        state = _state(model, optimizer)
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        return manifest


def prune(run: str, keep: int) -> None:
    """Delete all but the `keep` newest committed checkpoints, and what interrupted saves and deletions left behind.

    What is newer than the newest committed one stays: it may be under way. Rank 0 only.
    """
    kept = committed_steps(run)[-keep:]
    old = [uri for step, uri in _files(run) if kept and step < kept[-1] and step not in kept]
    # Manifests first: a half-deleted checkpoint must not look whole.
    for uri in sorted(old, key=lambda uri: storage.name(uri) != "manifest.json"):
        storage.delete(uri)


def committed_steps(run: str) -> list[int]:
    """Steps with a manifest, ascending."""
    return sorted(step for step, uri in _files(run) if storage.name(uri) == "manifest.json")


def _files(run: str) -> list[tuple[int, str]]:
    """Every file of every checkpoint, whole or not, with its step."""
    pattern = re.compile(r"/checkpoints/step_(\d{8})/[^/]+$")
    found = ((pattern.search(entry.uri), entry.uri) for entry in storage.walk(storage.join(run, "checkpoints")))
    return [(int(match[1]), uri) for match, uri in found if match]


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments}


def _upload(path: Path, uri: str) -> File:
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    name = path.name.lstrip(".")
    storage.upload(path, storage.join(uri, name))
    return File(name=name, bytes=path.stat().st_size, sha256=digest)


def _fetch_newest(run: str, folder: Path) -> Manifest | None:
    committed = committed_steps(run)
    for step in reversed(committed):
        try:
            return _fetch(uri_of(run, step), folder)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
    if committed:  # starting again from nothing would overwrite what may yet be mended
        raise CheckpointError(f"none of the {len(committed)} checkpoints of {run} is whole: choose another --run.name")
    return None


def _fetch(uri: str, folder: Path) -> Manifest:
    """Bring a checkpoint to `folder`. Raises `CheckpointError` if a file is missing or differs from its manifest."""
    try:
        manifest = Manifest.model_validate_json(storage.read(storage.join(uri, "manifest.json")))
    except (NotFound, ValidationError) as error:
        raise CheckpointError(f"{uri}/manifest.json is missing or damaged") from error
    for file in manifest.files:
        path = folder / (f".{METADATA}" if file.name == METADATA else file.name)
        try:
            storage.download(storage.join(uri, file.name), path)
        except NotFound as error:
            raise CheckpointError(f"{uri}/{file.name} is missing") from error
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != file.sha256:
                raise CheckpointError(f"{uri}/{file.name} is damaged: its sha256 is not the one in the manifest")
    return manifest
