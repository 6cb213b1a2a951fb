"""One task of preparation: a work unit and a view -> one shard of tokens, or two if a part is held out."""

import hashlib
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter, ValidationError

from igpt_ray import storage
from igpt_ray.data import sources, token_store
from igpt_ray.data.config import PixelsConfig
from igpt_ray.data.decoding import decode
from igpt_ray.data.image_files import RGB
from igpt_ray.data.palette import Palette
from igpt_ray.data.pixels import configured_view
from igpt_ray.data.sources import TRAIN, KeyFilter, UnreadableImage, WorkUnit
from igpt_ray.data.token_format import TokenFormat
from igpt_ray.data.token_store import Quarantined, Shard, Statistics
from igpt_ray.errors import ImageError, NotFound

ENCODE_BATCH = 64
"""Images that are quantised at once."""
HOLDOUT = "holdout"
QUARANTINE = TypeAdapter(list[Quarantined])


class Task(NamedTuple):
    """A work unit and the index of the view (crop) that is taken of its images."""

    unit: WorkUnit
    view: int


def tasks_of(plan: sources.Plan, views: int) -> list[Task]:
    """The tasks of a plan, ordered by split, view and unit. Only the training split has several views."""
    tasks = [Task(unit, view) for unit in plan.units for view in range(views if unit.split == TRAIN else 1)]
    return sorted(tasks, key=lambda task: (task.unit.split, task.view, task.unit.name))


def splits_of(unit: WorkUnit, holdout: float) -> list[str]:
    """The splits that a unit's images go to. Each gets a shard of its own."""
    return [TRAIN, HOLDOUT] if unit.split == TRAIN and holdout else [unit.split]


def held_out(key: str, holdout: float) -> bool:
    """Whether an image belongs to the hold-out.

    This depends on the key alone, so listing, view and repeat do not change it, and two copies of an image are never
    in different splits.
    """
    return sources.sampled(f"{HOLDOUT}\0{key}", holdout, seed=0)


def path_of(split: str, task: Task) -> str:
    """The shard's path, relative to the root of the store."""
    return f"{split}/{task.unit.name}-v{task.view}.parquet"


def quarantine_uri(root: str, split: str, task: Task) -> str:
    return storage.join(root, "quarantine", f"{split}-{task.unit.name}-v{task.view}.json")


class EncodedShard(NamedTuple):
    """The bytes of a shard, and the images that could not be read."""

    data: bytes
    quarantined: list[Quarantined]


class TaskResult(NamedTuple):
    """The shards of a task, each with the images that are missing from it."""

    n_planned: int
    """Number of images in the plan, which may be an estimate."""
    shards: list[tuple[Shard, list[Quarantined]]]
    reused: bool
    """All shards existed and were valid, so none was computed."""


class MakeShard:
    """Maps a `Task` to a `TaskResult`, and writes the shards that are missing or invalid.

    An existing shard is reused if its metadata match the task and its content is intact. A committed shard is compared
    with the sha256 in the manifest. An uncommitted shard is compared with the encoding of its own rows.
    """

    def __init__(self, root: str, kind: TokenFormat, pixels: PixelsConfig, holdout: float, committed: dict[str, str]):
        self.root = root
        self.kind = kind
        self.pixels = pixels
        self.holdout = holdout
        self.committed = committed
        self.palette = Palette.load(storage.join(root, "palette.npy"))

    def __call__(self, task: Task) -> TaskResult:
        splits = splits_of(task.unit, self.holdout)
        existing = {split: shard for split in splits if (shard := self._existing(task, split)) is not None}
        computed = self.make(task) if len(existing) < len(splits) else {}
        entries = []
        for split in splits:
            data, quarantined = existing[split] if split in existing else computed[split]
            if split not in existing:
                # The list is written first, so that every existing shard has its quarantine list.
                storage.write(quarantine_uri(self.root, split, task), QUARANTINE.dump_json(quarantined))
                storage.write(storage.join(self.root, path_of(split, task)), data)
            entries.append((self._entry(task, split, data), quarantined))
        return TaskResult(task.unit.images, entries, reused=not computed)

    def make(self, task: Task, key_filter: KeyFilter | None = None) -> dict[str, EncodedShard]:
        """The shard of each split, computed from the images that pass `key_filter`, or from all. Writes nothing."""
        builders = {split: _ShardBuilder(self.palette, self.kind) for split in splits_of(task.unit, self.holdout)}
        training = task.unit.split == TRAIN
        for image in sources.read(task.unit, key_filter, builders[task.unit.split].passed_over):
            split = HOLDOUT if HOLDOUT in builders and held_out(image.key, self.holdout) else task.unit.split
            if isinstance(image, UnreadableImage):
                builders[split].quarantine(image.key, image.reason)
                continue
            try:
                view = decode(
                    configured_view, image.data, self.pixels, self.kind.pipeline, training, image.key, task.view
                )
            except ImageError as error:
                builders[split].quarantine(image.key, str(error))
            else:
                builders[split].add(image, view)
        return {split: builder.build(self._metadata(task, split)) for split, builder in builders.items()}

    def _existing(self, task: Task, split: str) -> EncodedShard | None:
        """The stored shard if it equals, bit by bit, the one that would be computed."""
        path = path_of(split, task)
        try:
            data = storage.read(storage.join(self.root, path))
            quarantined = QUARANTINE.validate_json(storage.read(quarantine_uri(self.root, split, task)))
        except (NotFound, ValidationError):
            return None
        if path in self.committed:
            intact = hashlib.sha256(data).hexdigest() == self.committed[path]
            return EncodedShard(data, quarantined) if intact else None
        try:
            metadata = token_store.metadata((table := token_store.parse(data)).schema)
            statistics = metadata.pop("statistics")
            if metadata != {"format": token_store.FORMAT, **self.kind.model_dump(), **self._metadata(task, split)}:
                return None
            reencoded = token_store.reencode(table)
        except Exception:  # pyarrow raises many types on damaged files; each means that the shard is recomputed
            return None
        if reencoded != data or statistics["quarantined"] != len(quarantined):
            return None
        keys = {image.key for image in quarantined}
        if keys and self.make(task, keys.__contains__)[split].quarantined != quarantined:
            return None  # some of these images have become readable, or fail for another reason
        return EncodedShard(data, quarantined)

    def _entry(self, task: Task, split: str, data: bytes) -> Shard:
        """The shard's entry in the manifest."""
        rows, metadata = token_store.read_footer(data)
        return Shard(
            path=path_of(split, task),
            split=split,
            view=task.view,
            rows=rows,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            source=task.unit.digest,
            statistics=Statistics.model_validate(metadata["statistics"]),
        )

    def _metadata(self, task: Task, split: str) -> dict[str, Any]:
        random = task.unit.split == TRAIN and self.pixels.crop == "random"
        view = f"random-{task.view}" if random else "centre"
        holdout = {"holdout": self.holdout} if HOLDOUT in splits_of(task.unit, self.holdout) else {}
        return {"unit": task.unit.name, "split": split, "view": view, "source": task.unit.digest, **holdout}


class _ShardBuilder:
    """Collects the rows of one shard. Pixels are quantised in batches: faster than one image at a time, and with less
    memory than all at the end."""

    def __init__(self, palette: Palette, kind: TokenFormat):
        self.palette = palette
        self.kind = kind
        self.keys: list[str] = []
        self.labels: list[int] = []
        self.quarantined: list[Quarantined] = []
        self.source_bytes = self.squared_error = 0
        self.passed_over: Counter[str] = Counter()
        self._views: list[RGB] = []
        self._tokens = [np.empty((0, kind.n_positions), np.uint16)]

    def add(self, image: sources.Image, view: RGB) -> None:
        self.keys.append(image.key)
        self.labels.append(image.label)
        self.source_bytes += len(image.data)
        self._views.append(view)
        if len(self._views) == ENCODE_BATCH:
            self._encode()

    def quarantine(self, key: str, reason: str) -> None:
        self.quarantined.append(Quarantined(key=key, reason=reason))

    def build(self, metadata: dict[str, Any]) -> EncodedShard:
        if self._views:
            self._encode()
        statistics = Statistics(
            quarantined=len(self.quarantined),
            source_bytes=self.source_bytes,
            squared_error=self.squared_error,
            passed_over=dict(sorted(self.passed_over.items())),
        )
        metadata = {**metadata, "statistics": statistics.model_dump()}
        tokens = np.concatenate(self._tokens)
        return EncodedShard(token_store.encode(self.keys, self.labels, tokens, self.kind, metadata), self.quarantined)

    def _encode(self) -> None:
        rgb = np.stack(self._views).reshape(len(self._views), -1, 3)
        tokens = self.palette.encode(rgb)
        error = rgb.astype(np.int32) - self.palette.decode(tokens)
        self.squared_error += int(np.vdot(error, error))
        self._tokens.append(tokens)
        self._views.clear()
