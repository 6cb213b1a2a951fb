"""Images of a source and tokens of a store as Ray datasets, for pipelines outside this project."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from igpt_ray import storage
from igpt_ray.data import sources, token_store
from igpt_ray.data.sources import Image, Layout, WorkUnit
from igpt_ray.data.sources.folders import Files
from igpt_ray.data.token_store import Shard, TokenStore
from igpt_ray.errors import SourceError, TokenStoreError

OnError = Literal["raise", "column"]

BLOCK_BYTES = 32 << 20
"""Bytes of images after which a block ends. A read task holds one block and what its source reads ahead."""
IMAGE_BYTES = 110_000
"""Assumed size of an image in an archive: the mean of ImageNet's JPEGs."""
SCHEMA = pa.schema([("key", pa.string()), ("label", pa.int64()), ("split", pa.string()), ("bytes", pa.binary())])
ERROR = pa.field("error", pa.string())


def read_images(
    uri: str,
    layout: Layout | None = None,
    on_error: OnError = "raise",
    images_per_task: int = 1000,
    columns: Sequence[str] = (),
) -> ray.data.Dataset:
    """The images of a source in any layout, as a dataset with the columns key, label, split and bytes.

    `bytes` is the encoded image as stored; it is not decoded. `label` is an index into `ImageDatasource.classes`, or -1
    for an image without a label. `columns` are those of `igpt prepare --columns`. A member of an archive that cannot be
    read as an image file (a link, a sparse file, more than 128 MiB) ends the dataset with a `SourceError` that names
    it. With `on_error="column"` it is a row whose `bytes` is null, and whose reason is in a fifth column `error`. No
    image is left out.

    A read task is a work unit of `igpt prepare`: `images_per_task` single files, or one archive. Raises `SourceError`
    if the source is empty, or does not have the given or detected layout.
    """
    return ray.data.read_datasource(ImageDatasource(uri, layout, on_error, images_per_task, columns))


class ImageDatasource(Datasource):  # type: ignore[misc]  # Ray has no types
    """The plan of a source for `ray.data.read_datasource`; see `read_images`."""

    def __init__(
        self,
        uri: str,
        layout: Layout | None = None,
        on_error: OnError = "raise",
        images_per_task: int = 1000,
        columns: Sequence[str] = (),
    ):
        super().__init__()
        if on_error not in ("raise", "column"):
            raise SourceError(f"on_error is {on_error!r}: expected 'raise' or 'column'")
        plan = sources.plan(storage.absolute(uri), images_per_task, layout, columns)
        self.classes = plan.classes
        """Class names in the order of the labels."""
        self._units = plan.units
        self._on_error = on_error

    def estimate_inmemory_data_size(self) -> int:
        return sum(_estimated_bytes(unit) for unit in self._units)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task per work unit, whatever `parallelism` is."""
        return [
            ReadTask(
                functools.partial(_image_blocks, unit, self._on_error),
                # The number of images in an archive is an estimate, and Ray takes num_rows as exact.
                BlockMetadata(num_rows=None, size_bytes=_estimated_bytes(unit), exec_stats=None, input_files=None),
                schema=SCHEMA.append(ERROR) if self._on_error == "column" else SCHEMA,
                per_task_row_limit=per_task_row_limit,
            )
            for unit in self._units
        ]


def _estimated_bytes(unit: WorkUnit) -> int:
    return sum(unit.content.sizes) if isinstance(unit.content, Files) else unit.images * IMAGE_BYTES


def _image_blocks(unit: WorkUnit, on_error: OnError) -> Iterator[pa.Table]:
    rows: list[tuple[str, int | None, str, bytes | None, str | None]] = []
    n_bytes = 0
    for image in sources.read(unit):
        if isinstance(image, Image):
            rows.append((image.key, image.label, unit.split, image.data, None))
            n_bytes += len(image.data)
        elif on_error == "raise":
            raise SourceError(
                f"{unit.split}: {image.key} {image.reason}: remove it, or use on_error='column' to get its reason"
            )
        else:
            rows.append((image.key, None, unit.split, None, image.reason))
        if n_bytes >= BLOCK_BYTES:
            yield _table(rows, on_error)
            rows, n_bytes = [], 0
    yield _table(rows, on_error)


def _table(rows: list[tuple[Any, ...]], on_error: OnError) -> pa.Table:
    schema = SCHEMA.append(ERROR)
    columns = zip(*rows, strict=True) if rows else [[] for _ in schema]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)
    return table if on_error == "column" else table.drop_columns([ERROR.name])


def read_tokens(uri: str, split: str, view: int = 0) -> ray.data.Dataset:
    """The rows of a split of a token store, as a dataset with the columns key, label and tokens.

    `tokens` is a tensor column of shape (n_px * n_px,), uint16. `split` may join several, such as `train+holdout`. Each
    shard is compared with the size and sha256 in the manifest before its rows are used. Raises `TokenStoreError` if no
    store is committed at `uri`, or the store does not have this split and view.
    """
    return ray.data.read_datasource(TokenDatasource(uri, split, view))


class TokenDatasource(Datasource):  # type: ignore[misc]
    """The shards of a split for `ray.data.read_datasource`; see `read_tokens`."""

    def __init__(self, uri: str, split: str, view: int = 0):
        super().__init__()
        self.store = TokenStore.open(uri)
        views = self.store.manifest.views(split)
        if not 0 <= view < views:
            raise TokenStoreError(f"{split!r} of {uri} has no view {view}: expected 0 to {views - 1}")
        self._shards = self.store.manifest.select(split, view)

    def estimate_inmemory_data_size(self) -> int:
        return sum(self._bytes_of(shard) for shard in self._shards)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task per shard, whatever `parallelism` is."""
        return [
            ReadTask(
                functools.partial(_token_blocks, self.store.root, shard),
                BlockMetadata(
                    num_rows=shard.rows, size_bytes=self._bytes_of(shard), exec_stats=None, input_files=(shard.path,)
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for shard in self._shards
        ]

    def _bytes_of(self, shard: Shard) -> int:
        return shard.rows * (2 * self.store.kind.n_positions + 32)  # uint16 tokens; key and label


def _token_blocks(root: str, shard: Shard) -> Iterator[pa.Table]:
    yield token_store.read_shard(root, shard)
