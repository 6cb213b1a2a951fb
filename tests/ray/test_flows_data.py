"""Ray datasets of images and of tokens have every row of their source, and name what cannot be read."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from igpt_ray import storage
from igpt_ray.data import sources
from igpt_ray.data.token_store import TokenStore, tokens_of
from igpt_ray.errors import SourceError, TokenStoreError
from igpt_ray.flows import data
from tests.data.test_layouts import LAYOUTS, everything, tiny

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dataset_has_every_image_of_every_layout(layout: sources.Layout, tmp_path: Path) -> None:
    LAYOUTS[layout](str(tmp_path), tiny())
    images = everything(sources.plan(str(tmp_path), 3))
    expected = [(split, image.key, image.label, image.data) for split, image in images]  # type: ignore[union-attr]
    dataset = data.read_images(str(tmp_path), images_per_task=3)
    assert dataset.schema().names == ["key", "label", "split", "bytes"]
    rows = dataset.take_all()
    assert sorted((row["split"], row["key"], row["label"], row["bytes"]) for row in rows) == sorted(expected)
    assert dataset.count() == len(expected)


def test_a_dataset_works_in_pipelines_of_ray_data(digit_images: str) -> None:
    def sizes(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"label": batch["label"], "size": np.array([len(b) for b in batch["bytes"]])}

    source = data.ImageDatasource(digit_images, images_per_task=50)
    files = [entry.size for entry in storage.walk(digit_images)]
    assert source.classes == tuple("0123456789")
    assert source.estimate_inmemory_data_size() == sum(files)
    rows = data.read_images(digit_images, images_per_task=50).map_batches(sizes, batch_size=32).take_all()
    assert sorted(row["size"] for row in rows) == sorted(files)


def tar_with_a_link(folder: Path, digit_images: str) -> str:
    folder.mkdir()
    (folder / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    path = next(Path(digit_images, "train/3").iterdir())
    with tarfile.open(folder / "train-000.tar", "w") as shard:
        shard.add(path, "a.png")
        label = tarfile.TarInfo("a.cls")
        label.size = 1
        shard.addfile(label, io.BytesIO(b"3"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        shard.addfile(link)
    return str(folder)


def test_an_image_that_cannot_be_read_is_an_error_or_a_row(digit_images: str, tmp_path: Path) -> None:
    """No image is dropped silently."""
    source = tar_with_a_link(tmp_path / "images", digit_images)
    with pytest.raises(SourceError, match=r"link\.png.*on_error='column'"):
        data.read_images(source).take_all()
    good, bad = sorted(data.read_images(source, on_error="column").take_all(), key=lambda row: row["key"])
    assert (good["label"], good["error"], good["bytes"][:4]) == (3, None, b"\x89PNG")
    assert (bad["key"], bad["label"], bad["bytes"]) == ("link.png", None, None)
    assert "is a symbolic link" in bad["error"]
    with pytest.raises(SourceError, match="expected 'raise' or 'column'"):
        data.read_images(source, on_error="skip")  # type: ignore[arg-type]


def test_blocks_of_images_are_bounded(digit_images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of a class archive would be gigabytes."""
    monkeypatch.setattr(data, "BLOCK_BYTES", 4000)
    (task,) = data.ImageDatasource(str(Path(digit_images, "train")), images_per_task=1000).get_read_tasks(1)
    blocks = [block for block in task() if isinstance(block, pa.Table)]
    largest = max(entry.size for entry in storage.walk(digit_images))
    assert len(blocks) > 3
    assert all(sum(len(b.as_py()) for b in block["bytes"]) < 4000 + largest for block in blocks)
    assert sum(block.num_rows for block in blocks) == 120


def test_a_dataset_of_tokens_has_the_rows_of_the_store(prepared: str) -> None:
    store = TokenStore.open(storage.join(prepared, "tokens"))
    dataset = data.read_tokens(store.root, "train")
    assert dataset.count() == 120
    (batch,) = dataset.iter_batches(batch_size=120, batch_format="numpy")
    assert (batch["tokens"].dtype, batch["tokens"].shape) == (np.uint16, (120, 64))
    expected = {
        key: (label, tokens.tolist())
        for table in store.read_split("train")
        for key, label, tokens in zip(
            table["key"].to_pylist(), table["label"].to_pylist(), tokens_of(table), strict=True
        )
    }
    found = zip(batch["key"], batch["label"], batch["tokens"], strict=True)
    assert {str(key): (int(label), tokens.tolist()) for key, label, tokens in found} == expected
    torch_batch = next(iter(dataset.select_columns(["tokens", "label"]).iter_torch_batches(batch_size=7)))
    assert torch_batch["tokens"].shape == (7, 64)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:]])
def test_a_damaged_shard_is_an_error(prepared: str, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    shutil.copytree(Path(prepared, "tokens"), tmp_path / "tokens")
    store = TokenStore.open(str(tmp_path / "tokens"))
    path = Path(store.root, store.manifest.select("train")[1].path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TokenStoreError, match=f"{path} is damaged"):
        data.read_tokens(store.root, "train").take_all()


def test_a_split_or_view_that_the_store_lacks_is_named(prepared: str) -> None:
    root = storage.join(prepared, "tokens")
    with pytest.raises(TokenStoreError, match=r"has no view 1: expected 0 to 0"):
        data.read_tokens(root, "train", view=1)
    with pytest.raises(TokenStoreError, match="no split 'val'"):
        data.read_tokens(root, "val")
