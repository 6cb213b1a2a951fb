"""Sources: the plan is a function of the listing, and reading gives every image once, in order, with its label."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from igpt_ray import storage
from igpt_ray.data import sources
from igpt_ray.data.sources import Image, folders
from igpt_ray.errors import SourceError, StorageError


def fill(place: str, *keys: str) -> None:
    for key in keys:
        storage.write(storage.join(place, key), key.encode())


def everything(plan: sources.Plan) -> dict[str, list[Image]]:
    read: dict[str, list[Image]] = {}
    for unit in plan.units:
        read.setdefault(unit.split, []).extend(sources.read(unit))
    return read


def test_every_image_is_read_once_with_its_class(place: str) -> None:
    """Labels follow the order of the class names, not of the listing, where `a-b/x` comes before `a/x`."""
    fill(place, "a/x.png", "a/y.png", "a-b/x.png", "b/deep/er/z.png")
    plan = sources.plan(place, 3, "folders")
    assert plan.classes == ("a", "a-b", "b")
    assert everything(plan) == {
        "train": [
            Image("a-b/x.png", 1, b"a-b/x.png"),
            Image("a/x.png", 0, b"a/x.png"),
            Image("a/y.png", 0, b"a/y.png"),
            Image("b/deep/er/z.png", 2, b"b/deep/er/z.png"),
        ]
    }


def test_splits_are_folders_that_share_the_classes_of_training(place: str) -> None:
    """A test split with two of three classes must not number them by itself."""
    fill(place, "train/a/1", "train/b/1", "train/c/1", "val/c/2", "test/b/3", "test/c/3")
    plan = sources.plan(place, 10)
    assert plan.classes == ("a", "b", "c")
    assert [unit.split for unit in plan.units] == ["test", "train", "val"]
    read = everything(plan)
    assert read["val"] == [Image("c/2", 2, b"val/c/2")]
    assert [image.label for image in read["test"]] == [1, 2]
    assert [image.key for image in read["train"]] == ["a/1", "b/1", "c/1"]


def test_units_have_a_fixed_size_and_numbered_names(tmp_path: object) -> None:
    """A unit's name is its shard's: if it depended on anything but the listing, a repeat would duplicate data."""
    place = str(tmp_path)
    fill(place, *(f"train/c{i % 3}/{i:02d}" for i in range(11)), "test/c0/x")
    plan = sources.plan(place, 4)
    assert [(u.split, u.name, u.images) for u in plan.units] == [
        ("test", "00000", 1),
        ("train", "00000", 4),
        ("train", "00001", 4),
        ("train", "00002", 3),
    ]
    assert sources.plan(place, 4) == plan


def test_a_unit_s_digest_covers_its_listing(tmp_path: object) -> None:
    """An existing shard must not be reused after an image was replaced, renamed or moved to another class."""
    storage.write(f"{tmp_path}/one/cat/1", b"1")
    (first,) = sources.plan(f"{tmp_path}/one", 4).units
    digests = {first.digest}
    for name, keys in (("size", {"cat/1": b"22"}), ("key", {"cat/2": b"1"}), ("label", {"ant/0": b"1", "cat/1": b"1"})):
        for key, data in keys.items():
            storage.write(f"{tmp_path}/{name}/{key}", data)
        digests.add(sources.plan(f"{tmp_path}/{name}", 1).units[-1].digest)
    assert len(digests) == 4
    storage.write(f"{tmp_path}/copy/cat/1", b"1")
    assert sources.plan(f"{tmp_path}/copy", 4).units[0].digest == first.digest


def test_classes_of_all_splits_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A class that only the test split has gets its own number and a warning, because its name may be misspelt."""
    fill(str(tmp_path), "train/cat/1", "train/dog/1", "test/cow/1")
    plan = sources.plan(str(tmp_path), 10)
    assert plan.classes == ("cat", "cow", "dog")
    assert everything(plan)["test"] == [Image("cow/1", 1, b"test/cow/1")]
    assert "1 of 3 classes have no training image: cow" in caplog.text


def test_a_split_alone_has_its_own_classes(tmp_path: object) -> None:
    """A folder without a training split can be evaluated."""
    fill(str(tmp_path), "val/a/1", "val/b/1")
    plan = sources.plan(str(tmp_path), 4)
    assert (plan.classes, [u.split for u in plan.units]) == (("a", "b"), ["val"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], "does not exist or holds no files"),
        (["README.md", "a/labels.csv"], "holds no JPEG, PNG or WebP, but files of other kinds: .csv, .md"),
        (["a/1", "loose.png"], "at different depths, 'loose.png' and 'a/1': add --layout folders if"),
        (["train/a/1", "train/loose.png"], "at different depths, 'loose.png' and 'a/1'"),
        (["train/a/1", "loose.png"], "loose.png is next to the split folders train"),
        (["train/a/1", "extra/b/1", "zoo/b/1"], r"folders train, which look like splits, and others \(extra, zoo\)"),
        (["Train/a/1", "training/a/1"], "Train, training, of which several name the same split"),
        (["train_x/1.png", "test_x/1.png"], r"look like splits \(test_x, train_x\): rename them"),
        (["imagenet/train/a/1", "imagenet/val/a/1"], "one folder too high, because imagenet holds the splits"),
        (["a/train/1", "b/train/1", "b/test/1"], "one folder too high, because a holds the splits train"),
        (["top/a/1", "top/b/1"], "one folder too high: the only folder 'top' holds a, b"),
        (["a/x/1", "b/x/1"], "one folder too high: each of its 2 folders holds x"),
        (["a/1", "b/c/1"], "at different depths, 'a/1' and 'b/c/1'"),
        (["train/a/1", "val/1.png"], "images of val in .* are in no class folders.*--layout flat"),
        (["images.zip"], "images.zip is a zip archive: unpack it"),
        (["data-00000-of-00001.arrow", "state.json"], "is an Arrow file of Hugging Face's save_to_disk"),
        (["index.json", "shard.00000.mds"], "is a shard of MosaicML"),
    ],
)
def test_a_folder_of_another_layout_is_an_error_with_the_expected_layout(
    keys: list[str], said: str, tmp_path: object
) -> None:
    """A file must not be read as a class, nor a class as a split."""
    fill(str(tmp_path), *keys)
    with pytest.raises(SourceError, match=said):
        sources.plan(str(tmp_path), 10)


def test_hidden_files_are_ignored(tmp_path: object) -> None:
    """`.DS_Store` and partially copied files would fill the quarantine."""
    fill(str(tmp_path), "a/1", "a/.DS_Store", ".cache/1")
    assert [image.key for image in sources.read(sources.plan(str(tmp_path), 10).units[0])] == ["a/1"]


def test_a_unit_larger_than_the_read_ahead_keeps_its_order(on_rclone: str) -> None:
    """Images keep their order although threads finish in any order, and an error of a thread is raised."""
    keys = [f"a/{i:03d}" for i in range(4 * folders.READ_AHEAD + 9)]
    fill(on_rclone, *keys)
    unit = sources.plan(on_rclone, 1000).units[0]
    assert [(image.key, image.data.decode()) for image in sources.read(unit)] == [(key, key) for key in keys]
    storage.delete(storage.join(on_rclone, keys[-2]))
    with pytest.raises(StorageError, match=keys[-2]):
        list(sources.read(unit))


@pytest.fixture
def draws() -> Callable[[float, int], np.ndarray]:
    keys = [f"n{i % 1000:08d}/{i}.JPEG" for i in range(20_000)]
    return lambda fraction, seed: np.array([sources.sampled(key, fraction, seed) for key in keys])


def test_a_sample_has_the_requested_share_and_depends_on_its_seed(draws: Callable[[float, int], np.ndarray]) -> None:
    """The sample is drawn from all keys, and not by Python's hash, which every process salts differently."""
    tenth = draws(0.1, 0)
    assert 0.09 < tenth.mean() < 0.11
    assert 0.08 < tenth[:10_000].mean() < 0.12
    np.testing.assert_array_equal(tenth, draws(0.1, 0))
    other = draws(0.1, 1)
    assert 0.005 < (tenth & other).mean() < 0.015  # independent of another seed's
    assert (tenth <= draws(0.2, 0)).all()  # a larger sample contains a smaller one
    assert draws(1, 0).all()
    assert not draws(0, 0).any()
