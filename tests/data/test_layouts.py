"""One set of images in five layouts, on disk and in a bucket, gives the same keys, labels and bytes."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
import textwrap
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igpt_ray import storage
from igpt_ray.data import sources
from igpt_ray.data.sources import Image, Layout, UnreadableImage, imagenet, parquet, ranges, units, webdataset
from igpt_ray.errors import SourceError


class Picture(NamedTuple):
    split: str
    wnid: str
    name: str
    """ImageNet's file name."""
    data: bytes


def tiny() -> list[Picture]:
    """Nine training images of three classes, and four validation images, of two of them and of another class."""
    found = []
    for wnid in ("n00000003", "n00000001", "n00000007"):
        found += [Picture("train", wnid, f"{wnid}_{i}.JPEG", f"{wnid} {i}".encode() * 40 * i) for i in (7, 10, 9)]
    for i, wnid in enumerate(("n00000007", "n00000001", "n00000005", "n00000001"), 1):
        found.append(Picture("val", wnid, f"ILSVRC2012_val_{i:08d}.JPEG", b"validate %d" % i * 99))
    return found


def real(shared: Path) -> list[Picture]:
    """The 100 files of the ImageNet sample."""
    folder = shared / "data/imagenet_sample"
    found = []
    with tarfile.open(folder / "ILSVRC2012_img_train.tar") as outer:
        for inner in outer:
            with tarfile.open(fileobj=outer.extractfile(inner)) as images:
                found += [Picture("train", inner.name[:9], m.name, contents(images, m)) for m in images]
    wnids = (folder / "ILSVRC2012_validation_synsets.txt").read_text().split()
    with tarfile.open(folder / "ILSVRC2012_img_val.tar") as images:
        members = sorted(images, key=lambda m: m.name)
        found += [Picture("val", w, m.name, contents(images, m)) for w, m in zip(wnids, members, strict=True)]
    return found


def contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file
    return file.read()


# ------------------------------------------------------------------------------------------------ the five layouts


def tar(files: dict[str, bytes], kinds: dict[str, bytes] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), (kinds or {}).get(name, tarfile.REGTYPE)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def classes_of(pictures: list[Picture]) -> list[str]:
    return sorted({picture.wnid for picture in pictures})


def as_folders(place: str, pictures: list[Picture]) -> None:
    for split, wnid, name, data in pictures:
        storage.write(storage.join(place, split, wnid, name), data)


def as_kaggle(place: str, pictures: list[Picture]) -> None:
    lines = ["ImageId,PredictionString"]
    for split, wnid, name, data in pictures:
        folder = [split, wnid] if split == "train" else [split]
        storage.write(storage.join(place, "ILSVRC/Data/CLS-LOC", *folder, name), data)
        if split == "val":
            lines.append(f"{name[:-5]},{wnid} 85 1 499 272 {wnid} 1 2 3 4 ")
    storage.write(storage.join(place, "LOC_val_solution.csv"), "\r\n".join(lines[:1] + lines[:0:-1]).encode())
    storage.write(storage.join(place, "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml"), b"<boxes/>")


def as_tars(place: str, pictures: list[Picture]) -> None:
    train = {w: {p.name: p.data for p in pictures if p[:2] == ("train", w)} for w in classes_of(pictures)}
    outer = tar({f"{wnid}.tar": tar(files) for wnid, files in sorted(train.items(), reverse=True) if files})
    val = [p for p in pictures if p.split == "val"]
    storage.write(storage.join(place, "ILSVRC2012_img_train.tar"), outer)
    storage.write(storage.join(place, "ILSVRC2012_img_val.tar"), tar({p.name: p.data for p in reversed(val)}))
    labels = "".join(f"{p.wnid}\n" for p in sorted(val, key=lambda p: p.name))
    storage.write(storage.join(place, "ILSVRC2012_validation_synsets.txt"), labels.encode())


def as_webdataset(place: str, pictures: list[Picture]) -> None:
    index = classes_of(pictures).index
    for split in ("train", "val"):
        chosen = [p for p in pictures if p.split == split]
        for shard, start in enumerate(range(0, len(chosen), 30)):
            files = {}
            for p in chosen[start : start + 30]:
                files |= {f"{p.name[:-5]}.jpg": p.data, f"{p.name[:-5]}.cls": str(index(p.wnid)).encode()}
            storage.write(storage.join(place, f"imagenet-{split}-{shard:06d}.tar"), tar(files))


def table(rows: list[tuple[bytes | None, str | None, int | None]], names: list[str] | None = None) -> bytes:
    images = pa.array([{"bytes": data, "path": path} for data, path, _ in rows], parquet_image())
    made = pa.table({"image": images, "label": pa.array([label for *_, label in rows], pa.int64())})
    if names is not None:
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(about)})
    out = io.BytesIO()
    pq.write_table(made, out, row_group_size=4)
    return out.getvalue()


def parquet_image() -> pa.DataType:
    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def as_parquet(place: str, pictures: list[Picture]) -> None:
    names = classes_of(pictures)
    for split in ("train", "val"):
        rows = [(p.data, f"{p.name[:-5]}_{p.wnid}.JPEG", names.index(p.wnid)) for p in pictures if p.split == split]
        spelled = "validation" if split == "val" else split
        for shard, start in enumerate(range(0, len(rows), 30)):
            uri = storage.join(place, f"data/{spelled}-{shard:05d}-of-00003.parquet")
            storage.write(uri, table(rows[start : start + 30], names))


LAYOUTS: dict[Layout, Callable[[str, list[Picture]], None]] = {
    "folders": as_folders,
    "kaggle": as_kaggle,
    "tars": as_tars,
    "webdataset": as_webdataset,
    "parquet": as_parquet,
}


def expected(pictures: list[Picture]) -> set[tuple[str, Image]]:
    index = classes_of(pictures).index
    return {(p.split, Image(p.name[:-5], index(p.wnid), p.data)) for p in pictures}


def everything(plan: sources.Plan) -> list[tuple[str, Image | UnreadableImage]]:
    return [(unit.split, image) for unit in plan.units for image in sources.read(unit)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_store_gives_the_same_images(layout: Layout, place: str) -> None:
    """Labels do not depend on the order of an archive, nor keys on the file extension of a layout."""
    LAYOUTS[layout](place, tiny())
    plan = sources.plan(place, 3)
    assert plan.layout == layout
    assert len(plan.classes) == 4
    if layout != "webdataset":  # which knows class 2 by its number alone, for it has no training image
        assert list(plan.classes) == classes_of(tiny())
    read = everything(plan)
    assert set(read) == expected(tiny())
    assert len(read) == 13
    assert sources.plan(place, 3) == plan
    assert sources.plan(place, 3, layout) == plan


@pytest.mark.parametrize("store", ["local", "bucket"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_imagenet_sample_is_the_same_in_every_layout(
    layout: Layout, store: str, shared: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """80 training and 20 validation files of ImageNet, with real names and sizes, and blocks that end inside images."""
    place = str(tmp_path / "images") if store == "local" else request.getfixturevalue("on_rclone")
    pictures = real(shared)
    LAYOUTS[layout](place, pictures)
    read = everything(sources.plan(place, 7))
    assert len(read) == 100
    assert set(read) == expected(pictures)


def test_the_original_archives_are_read_without_unpacking(shared: Path) -> None:
    """The tars that these tests write may be simpler than ImageNet's."""
    assert set(everything(sources.plan(str(shared / "data/imagenet_sample"), 7))) == expected(real(shared))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_unit_can_be_pickled_and_its_digest_does_not_depend_on_the_location(layout: Layout, tmp_path: Path) -> None:
    """A digest of the location would recompute everything after a move; one without the content would miss changes."""
    for name in ("here", "there"):
        LAYOUTS[layout](str(tmp_path / name), tiny())
    changed = [p._replace(data=p.data * 30) if p.name.endswith("1_7.JPEG") else p for p in tiny()]
    LAYOUTS[layout](str(tmp_path / "changed"), changed)
    here, there, other = (list(sources.plan(str(tmp_path / n), 3).units) for n in ("here", "there", "changed"))
    assert [unit.digest for unit in here] == [unit.digest for unit in there]
    assert {unit.digest for unit in here} - {unit.digest for unit in other}
    assert pickle.loads(pickle.dumps(here)) == here
    assert len(pickle.dumps(here[0])) < 700
    wanted = {image.key for unit in here for image in sources.read(unit, lambda key: key.endswith("_10"))}
    assert wanted == {"n00000001_10", "n00000003_10", "n00000007_10"}


def test_the_size_of_a_unit_is_exact_or_a_close_estimate(shared: Path, tmp_path: Path) -> None:
    """A palette's sample is a share of the images, so that an error of the estimate changes its size."""
    for layout, build in LAYOUTS.items():
        place = str(tmp_path / layout)
        build(place, real(shared))
        total = sum(unit.images for unit in sources.plan(place, 50).units if unit.split == "train")
        assert 60 <= total <= 120, layout


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764_10026"),
        ("n01440764_10026_n01440764.JPEG", "n01440764_10026"),
        ("a/b/ILSVRC2012_val_00000001_n01751748.JPEG", "ILSVRC2012_val_00000001"),
        ("ILSVRC2012_test_00000001.jpg", "ILSVRC2012_test_00000001"),
        ("cat/1.png", "cat/1.png"),
        ("cat/1.jpg", "cat/1.jpg"),
        ("n01440764/my_10026.JPEG", "n01440764/my_10026.JPEG"),
    ],
)
def test_the_key_of_an_imagenet_image_is_its_own_name(path: str, key: str) -> None:
    """Two images with one key would share a crop and be duplicates; an image with two keys would have two crops."""
    assert units.key_of(path) == key


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("imagenet1k-train-0001.tar", "train"),
        ("train/val-0001.tar", "val"),
        ("validation/0001.tar", "val"),
        ("data/test-00000-of-00003.parquet", "test"),
        ("retrained-0001.tar", "train"),
        ("0001.tar", "train"),
    ],
)
def test_the_split_is_in_the_name(path: str, split: str) -> None:
    """`val` may be anywhere in a name, and `retrained` is not `train`."""
    assert units.split_of(path) == split
    with pytest.raises(SourceError, match="several splits"):
        units.split_of("train-and-val.tar")


def test_names_stay_in_order_when_a_split_has_more_units_than_five_digits() -> None:
    drafts = (units.DraftUnit("train", 1, i) for i in range(100_001))
    named = [unit.name for unit in units.numbered(drafts)]
    assert named == sorted(named)
    assert named[-1] == "100000"


# ------------------------------------------------------------------------------------------------ errors


def test_kaggle_s_csv_must_list_every_validation_image(tmp_path: Path) -> None:
    """An image without a line must not get class 0."""
    as_kaggle(str(tmp_path), tiny())
    csv = tmp_path / "LOC_val_solution.csv"
    csv.write_text("".join(line for line in csv.read_text().splitlines(True) if "00000003" not in line))
    with pytest.raises(SourceError, match=r"no label for 1 validation images, such as ILSVRC2012_val_00000003\.JPEG"):
        sources.plan(str(tmp_path), 3)
    csv.unlink()
    with pytest.raises(SourceError, match=r"LOC_val_solution\.csv is needed for the labels of 4"):
        sources.plan(str(tmp_path), 3)


def test_kaggle_s_test_images_have_no_label(tmp_path: Path) -> None:
    as_kaggle(str(tmp_path), tiny())
    storage.write(f"{tmp_path}/ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG", b"?")
    read = everything(sources.plan(str(tmp_path), 30))
    assert ("test", Image("ILSVRC2012_test_00000001", units.UNLABELLED, b"?")) in read


def test_the_validation_labels_must_be_one_wordnet_id_per_line(tmp_path: Path) -> None:
    """A missing line shifts all later labels; ILSVRC's own numbers are not in the order of the WordNet ids."""
    as_tars(str(tmp_path), tiny())
    text = tmp_path / "ILSVRC2012_validation_synsets.txt"
    wnids = text.read_text().split()
    text.write_text("\n".join(wnids[1:]))
    with pytest.raises(SourceError, match="has 3 labels for 4 images"):
        sources.plan(str(tmp_path), 3)
    text.unlink()
    with pytest.raises(SourceError, match="needs a label file next to it"):
        sources.plan(str(tmp_path), 3)
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    number = {"n00000005": "1", "n00000001": "2", "n00000007": "3"}
    truth.write_text("\n".join(number[wnid] for wnid in wnids))
    with pytest.raises(SourceError, match=r"put map_clsloc\.txt next to it"):
        sources.plan(str(tmp_path), 3)
    (tmp_path / "map_clsloc.txt").write_text("".join(f"{wnid} {n} a_thing\n" for wnid, n in number.items()))
    assert set(everything(sources.plan(str(tmp_path), 3))) == expected(tiny())
    (tmp_path / "map_clsloc.txt").write_text("n00000005 1 a_thing\n")
    with pytest.raises(SourceError, match="which is not in"):
        sources.plan(str(tmp_path), 3)


def test_a_bad_member_of_the_validation_tar_shifts_no_label(tmp_path: Path) -> None:
    """The name of a damaged header is lost; later images must not take the labels before theirs."""
    as_tars(str(tmp_path), tiny())
    val = tmp_path / "ILSVRC2012_img_val.tar"
    data = bytearray(val.read_bytes())
    data[3] ^= 1
    val.write_bytes(data)
    with pytest.raises(SourceError, match="its tar header is damaged; labels follow the order of names"):
        sources.plan(str(tmp_path), 3)


def inside(files: dict[str, bytes], kinds: dict[str, bytes] | None = None) -> dict[str, bytes]:
    return {"n00000001.tar": tar({"n00000001_1.JPEG": b"good"}), "n00000002.tar": tar(files, kinds)}


@pytest.mark.parametrize(
    ("files", "kinds", "said"),
    [
        ({"x.tar": tar({"y.tar": tar({"z.jpg": b"deep"})})}, {}, "is a tar archive inside the archive of its class"),
        ({"/etc/passwd": b"root"}, {}, "points out of its archive"),
        ({"../../x.jpg": b"x"}, {}, "points out of its archive"),
        ({"link.jpg": b""}, {"link.jpg": tarfile.SYMTYPE}, "is a symbolic link"),
        ({"dev.jpg": b""}, {"dev.jpg": tarfile.BLKTYPE}, "is a device"),
    ],
)
def test_a_malicious_member_goes_to_quarantine_and_the_others_are_read(
    files: dict[str, bytes], kinds: dict[str, bytes], said: str, tmp_path: Path
) -> None:
    """A malicious file must neither be read nor cost other images of the class."""
    files = {"n00000002_1.JPEG": b"first", **files, "n00000002_2.JPEG": b"last"}
    storage.write(f"{tmp_path}/train.tar", tar(inside(files, kinds)))
    _, first, bad, last = [image for _, image in everything(sources.plan(str(tmp_path), 10))]
    assert (first, last) == (Image("n00000002_1", 1, b"first"), Image("n00000002_2", 1, b"last"))
    assert isinstance(bad, UnreadableImage)
    assert said in bad.reason


def test_a_file_too_large_for_an_image_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a terabyte with an image's name would fill the worker's memory."""
    for module in ("folders", "imagenet", "webdataset", "parquet"):
        monkeypatch.setattr(f"igpt_ray.data.sources.{module}.MAX_BYTES", 10_000)
    big = [p._replace(data=b"x" * 20_000) if p.name.endswith("3_7.JPEG") else p for p in tiny()]
    for layout, build in LAYOUTS.items():
        build(f"{tmp_path}/{layout}", big)
        bad = [
            image
            for _, image in everything(sources.plan(f"{tmp_path}/{layout}", 3))
            if isinstance(image, UnreadableImage)
        ]
        assert [image.key for image in bad] == ["n00000003_7"], layout
        assert "bytes" in bad[0].reason


@pytest.mark.parametrize("layout", ["tars", "webdataset"])
def test_a_truncated_archive_is_an_error_that_names_it(layout: Layout, tmp_path: Path) -> None:
    """An interrupted upload must not pass for a complete archive."""
    LAYOUTS[layout](str(tmp_path), tiny())
    victim = next(path for path in sorted(tmp_path.glob("*train*.tar")))
    victim.write_bytes(victim.read_bytes()[:-11_000])
    with pytest.raises(SourceError, match=rf"{victim.name}.*(is cut|left)"):
        everything(sources.plan(str(tmp_path), 3))


def test_a_damaged_inner_archive_is_an_error_that_names_its_class(tmp_path: Path) -> None:
    """The archive has 138 GB; the name of the class is needed to repair it."""
    good, cut = tar({"n00000001_1.JPEG": b"x"}), tar({"n00000002_1.JPEG": b"x" * 5000})[:3000]
    storage.write(f"{tmp_path}/train.tar", tar({"n00000001.tar": good, "n00000002.tar": cut}))
    units_ = sources.plan(str(tmp_path), 3).units
    assert list(sources.read(units_[0])) == [Image("n00000001_1", 0, b"x")]
    with pytest.raises(SourceError, match=r"unit train/00001 cannot be read: class n00000002: .*train\.tar is cut"):
        list(sources.read(units_[1]))


@pytest.mark.parametrize(
    ("outer", "said"),
    [
        ({"n00000001.tar": tar({})}, "n00000001.tar holds no images"),
        ({"n00000001.tar": tar({"a.jpg": b"x"}), "README": b"x"}, "'README' is not a tar archive"),
        ({"n1.tar": tar({"a.jpg": b"x"}), "x/n1.tar": tar({"a.jpg": b"x"})}, "holds the class n1 twice"),
        ({"../n1.tar": tar({"a.jpg": b"x"})}, "points out of its archive"),
    ],
)
def test_an_outer_tar_has_exactly_one_tar_per_class(outer: dict[str, bytes], said: str, tmp_path: Path) -> None:
    """A class without images would shift the labels of all later classes relative to another copy of ImageNet."""
    storage.write(f"{tmp_path}/ILSVRC2012_img_train.tar", tar(outer))
    with pytest.raises(SourceError, match=said):
        sources.plan(str(tmp_path), 3)


def test_a_flat_archive_of_too_many_members_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan has all names in memory."""
    monkeypatch.setattr(imagenet, "MAX_FLAT", 3)
    as_tars(str(tmp_path), tiny())
    with pytest.raises(SourceError, match="has more than 3 members"):
        sources.plan(str(tmp_path), 3)


# ------------------------------------------------------------------------------------------------ WebDataset


def shard(tmp_path: Path, files: dict[str, bytes], name: str = "train-0.tar") -> list[Image | UnreadableImage]:
    storage.write(f"{tmp_path}/{name}", tar(files))
    return [image for _, image in everything(sources.plan(str(tmp_path), 3))]


def test_members_of_a_sample_share_their_stem(tmp_path: Path) -> None:
    """.cls before or after .jpg, .json instead, other members in between, dots in folders, capital letters."""
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\n")
    files = {"a.b/1.cls": b"2\n", "a.b/1.jpg": b"one", "a.b/1.txt": b"caption", "2.JPEG": b"two", "2.cls": b" 1"}
    files |= {
        "3.seg.png": b"mask",
        "3.png": b"three",
        "3.json": b'{"label": 0}',
        "4.webp": b"4",
        "4.json": b'{"label": 1}',
    }
    assert shard(tmp_path, files) == [
        Image("a.b/1.jpg", 2, b"one"), Image("2.JPEG", 1, b"two"), Image("3.png", 0, b"three"), Image("4.webp", 1, b"4")
    ]  # fmt: skip


def test_an_incomplete_sample_is_reported(tmp_path: Path) -> None:
    """Two incomplete samples must not be merged into one."""
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    read = shard(tmp_path, {"1.jpg": b"one", "2.cls": b"1", "3.jpg": b"three", "3.cls": b"0"})
    assert read[2] == Image("3.jpg", 0, b"three")
    assert [type(image) for image in read[:2]] == [UnreadableImage, UnreadableImage]
    assert ["has no label" in read[0][1], "no image" in read[1][1]] == [True, True]
    twice = shard(tmp_path, {"1.cls": b"1", "1.jpg": b"one", "1.png": b"again"})
    assert [type(image) for image in twice] == [Image, UnreadableImage]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"1.jpg": b"x", "1.cls": b"2"}, "train-0.tar: 1.jpg has label 2: expected 0 to 1"),
        ({"1.jpg": b"x", "1.cls": b"-2"}, "has label -2"),
        ({"1.jpg": b"x", "1.cls": b"dog"}, "'dog', which is not one of the 2 classes"),
        ({"1.jpg": b"x", "1.json": b"{"}, "is not valid JSON"),
        ({"1.jpg": b"x", "1.json": b"[" * 100_000}, "is not valid JSON"),
        ({"1.jpg": b"x", "1.json": b'{"label": [1]}'}, "expected a number or a name"),
    ],
)
def test_an_invalid_label_is_an_error_that_names_the_image(files: dict[str, bytes], said: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(SourceError, match=said):
        shard(tmp_path, files)


def test_labels_may_be_names(tmp_path: Path) -> None:
    files = {"1.jpg": b"x", "1.cls": b"bee", "2.jpg": b"y", "2.cls": b"ant"}
    assert shard(tmp_path, files) == [Image("1.jpg", 1, b"x"), Image("2.jpg", 0, b"y")]
    with pytest.raises(SourceError, match="both numbers and names as labels"):
        shard(tmp_path, {"1.jpg": b"x", "1.cls": b"1"}, "train-1.tar")


def test_many_shards_must_name_their_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the labels of a million shards takes days, and the first shards may lack classes."""
    monkeypatch.setattr(webdataset, "MAX_SURVEYED", 2)
    monkeypatch.setattr(parquet, "MAX_SURVEYED", 2)
    for i in range(3):
        storage.write(f"{tmp_path}/wds/{i}.tar", tar({"1.jpg": b"x", "1.cls": b"0"}))
        storage.write(f"{tmp_path}/pq/{i}.parquet", table([(b"x", "1.jpg", 0)]))
    for kind in ("wds", "pq"):
        with pytest.raises(SourceError, match=r"add a classes\.txt"):
            sources.plan(f"{tmp_path}/{kind}", 3)
        (tmp_path / kind / "classes.txt").write_text("ant\n")
        assert len(everything(sources.plan(f"{tmp_path}/{kind}", 3))) == 3
    (tmp_path / "wds/classes.txt").write_text("ant\nant\n")
    with pytest.raises(SourceError, match="repeated names"):
        sources.plan(f"{tmp_path}/wds", 3)


# ------------------------------------------------------------------------------------------------ Parquet


def test_a_parquet_file_is_divided_into_runs_of_row_groups(tmp_path: Path) -> None:
    """Row numbers identify images without a path, so that a unit inside a file must count from its first row."""
    rows = [(b"%d" % i, None if i % 2 else f"{i}.png", i % 3) for i in range(10)]
    storage.write(f"{tmp_path}/train-00000-of-00001.parquet", table(rows))
    plan = sources.plan(str(tmp_path), 4)
    assert [unit.images for unit in plan.units] == [4, 4, 2]
    read = [image for unit in reversed(plan.units) for image in sources.read(unit)]
    assert sorted(read, key=lambda image: image[-1]) == [
        Image(f"train-00000-of-00001.parquet/{i}" if i % 2 else f"{i}.png", i % 3, b"%d" % i) for i in range(10)
    ]
    assert plan.classes == ("0", "1", "2")


def test_many_parquet_files_are_one_unit_each_and_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_parquet(str(tmp_path), tiny())
    monkeypatch.setattr(parquet, "MAX_OPENED", 1)
    assert set(everything(sources.plan(str(tmp_path), 1))) == expected(tiny())
    assert len(sources.plan(str(tmp_path), 1).units) == 2


def test_rows_without_bytes_are_reported_and_rows_without_labels_keep_none(tmp_path: Path) -> None:
    """Hugging Face's test splits have the label -1, which must not index the last class."""
    storage.write(
        f"{tmp_path}/test-0.parquet", table([(b"x", "1.png", -1), (None, "2.png", 0), (b"x", "3.png", None)], ["a"])
    )
    assert [image for _, image in everything(sources.plan(str(tmp_path), 3))] == [
        Image("1.png", -1, b"x"),
        UnreadableImage("2.png", "has no bytes in row test-0.parquet/1"),
        Image("3.png", -1, b"x")
    ]  # fmt: skip
    storage.write(f"{tmp_path}/train-0.parquet", table([(b"x", "1.png", -2)], ["a"]))
    with pytest.raises(SourceError, match=r"train-0\.parquet/0 \(1\.png\) has label -2: expected 0 to 0"):
        everything(sources.plan(str(tmp_path), 3))


def damaged(data: bytes) -> dict[str, bytes]:
    return {"cut": data[:-9], "magic": data[:-1] + b"2", "text": b"no table", "empty": b""}


@pytest.mark.parametrize("damage", ["cut", "magic", "text", "empty"])
def test_a_damaged_parquet_file_is_named(damage: str, tmp_path: Path) -> None:
    storage.write(f"{tmp_path}/train-0.parquet", damaged(table([(b"x" * 500, "1.png", 0)]))[damage])
    with pytest.raises(SourceError, match=r"train-0\.parquet is damaged or not a Parquet file"):
        sources.plan(str(tmp_path), 3)


def test_a_flipped_bit_in_a_page_with_a_checksum_is_detected(tmp_path: Path) -> None:
    """Most writers omit the checksums; existing ones are verified."""
    made = pq.read_table(io.BytesIO(table([(b"x" * 500, "1.png", 0)], ["a"])))
    plainly = {"write_statistics": False, "compression": "none", "use_dictionary": False}
    pq.write_table(made, tmp_path / "train-0.parquet", write_page_checksum=True, **plainly)
    data = bytearray((tmp_path / "train-0.parquet").read_bytes())
    data[data.index(b"xxx") + 100] ^= 1
    (tmp_path / "train-0.parquet").write_bytes(data)
    with pytest.raises(SourceError, match=r"unit train/00000 cannot be read: .*train-0\.parquet is damaged"):
        everything(sources.plan(str(tmp_path), 3))


def test_a_table_of_other_columns_is_an_error(tmp_path: Path) -> None:
    """No column of unknown type is decoded, because extension types may unpickle their content."""
    for i, columns in enumerate(({"image": [[1, 2]], "label": [0]}, {"img": [1]}, {"image": [{"data": b"x"}]})):
        pq.write_table(pa.table(columns), tmp_path / "0.parquet")
        with pytest.raises(SourceError, match="expected an image column of struct<bytes: binary, path: string>"):
            sources.plan(str(tmp_path), 3 + i)


def test_files_with_different_class_names_are_an_error(tmp_path: Path) -> None:
    storage.write(f"{tmp_path}/train-0.parquet", table([(b"x", "1.png", 0)], ["a", "b"]))
    storage.write(f"{tmp_path}/train-1.parquet", table([(b"x", "2.png", 0)], ["b", "a"]))
    with pytest.raises(SourceError, match="name different classes"):
        sources.plan(str(tmp_path), 3)


@pytest.mark.parametrize("layout", ["tars", "webdataset", "parquet"])
def test_reading_a_large_unit_needs_memory_for_a_window_only(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory must not grow with a row group or archive of 20 MB."""
    monkeypatch.setattr(ranges, "LARGEST", 1 << 20)
    monkeypatch.setattr(parquet, "LARGEST", 1 << 20)
    noise = np.random.default_rng(0)
    pictures = [Picture("train", "n00000001", f"n00000001_{i}.JPEG", noise.bytes(100_000)) for i in range(200)]
    if layout == "tars":
        as_tars(str(tmp_path), pictures)
    elif layout == "webdataset":
        files = [
            (f"{i}{end}", data) for i, p in enumerate(pictures) for end, data in ((".jpg", p.data), (".cls", b"0"))
        ]
        storage.write(f"{tmp_path}/train.tar", tar(dict(files)))
    else:
        made = pq.read_table(io.BytesIO(table([(p.data, p.name, 0) for p in pictures], ["n00000001"])))
        pq.write_table(made, tmp_path / "train.parquet", row_group_size=1000, write_batch_size=8)
    unit = sources.plan(str(tmp_path), 1000, layout).units[0]
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    in_arrow = [pa.total_allocated_bytes() - before for _ in sources.read(unit)]
    peak = max(in_arrow) + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(in_arrow) == 200
    assert peak < 8 << 20


def test_two_kinds_of_files_need_an_explicit_layout(tmp_path: Path) -> None:
    as_webdataset(str(tmp_path), tiny())
    as_parquet(str(tmp_path), tiny())
    with pytest.raises(SourceError, match="choose one with --layout"):
        sources.plan(str(tmp_path), 3)
    assert set(everything(sources.plan(str(tmp_path), 3, "parquet"))) == expected(tiny())


# ------------------------------------------------------------------------------------------------ scale

BILLION = textwrap.dedent(
    """
    import re, sys, time
    from igpt_ray import storage
    from igpt_ray.data import sources

    layout, n_shards, real_first, names = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    suffix = {"webdataset": "tar", "parquet": "parquet"}[layout]
    content = open(real_first, "rb").read()

    def walk(uri):
        for i in range(n_shards):
            yield storage.Entry(f"{uri}/train/shard-{i:07d}.{suffix}", len(content) if i == 0 else 110_000_000)

    def read(uri, start=0, length=None):
        if uri.endswith("classes.txt"):
            return names.encode()
        assert uri.endswith(f"shard-0000000.{suffix}"), f"{uri} was read while planning"
        return content[start:] if length is None else content[start : start + length]

    def peak():  # unlike ru_maxrss, not inherited from the process that started this one
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024  # MiB

    storage.walk, storage.read = walk, read
    storage.read_versioned = lambda *words: (read(*words), (len(content), None))
    before = peak()
    started = time.perf_counter()
    plan = sources.plan("s3://bucket/images", 10_000)
    seconds = time.perf_counter() - started
    print(len(plan.units), len(plan.classes), seconds, peak() - before)
    """
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("layout", "n_shards"), [("webdataset", 1_000_000), ("parquet", 100_000)])
def test_a_billion_images_are_planned_in_bounded_memory(layout: str, n_shards: int, tmp_path: Path) -> None:
    """A simulated million tars of 1,000 images, or 100,000 tables of 10,000 rows: the plan must keep nothing per image
    and send no request per shard."""
    first = tar({"1.jpg": b"x" * 1000, "1.cls": b"0"}) if layout == "webdataset" else table([(b"x", "1.png", 0)])
    (tmp_path / "first").write_bytes(first)
    names = "\n".join(f"n{i:08d}" for i in range(1000))
    words = [layout, str(n_shards), str(tmp_path / "first"), names]
    said = subprocess.run([sys.executable, "-c", BILLION, *words], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    n, classes, seconds, mib = said.stdout.split()
    print(f"{layout}: {seconds} s, {mib} MiB")
    assert (int(n), int(classes)) == (n_shards, 1000)
    assert float(seconds) < 120
    assert float(mib) < 600
