"""Sources as users have them: split names, sets without labels, other columns, patterns, archives, stray files."""

import gzip
import io
import lzma
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture

from igpt_ray import storage
from igpt_ray.data import sources
from igpt_ray.data.config import Layout
from igpt_ray.data.sources import Image, UnreadableImage, listing
from igpt_ray.errors import IgptError, SourceError


def fill(root: Path, *paths: str) -> str:
    for path in paths:
        storage.write(storage.join(str(root), path), path.encode())
    return str(root)


def tar(path: Path, files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out.getvalue())
    return out.getvalue()


def everything(plan: sources.Plan, passed_over: Counter[str] | None = None) -> list[tuple[str, str, int | str]]:
    """Split, key, and label or reason of everything that a plan reads."""
    return [
        (unit.split, image.key, image.reason if isinstance(image, UnreadableImage) else image.label)
        for unit in plan.units
        for image in sources.read(unit, None, passed_over)
    ]


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    "names", [("training", "validation", "testing"), ("Train", "Val", "TEST"), ("train", "valid", "test")]
)
def test_splits_have_their_usual_spellings_in_any_case(names: tuple[str, str, str], tmp_path: Path) -> None:
    train, val, test = names
    plan = sources.plan(fill(tmp_path, f"{train}/a/1.jpg", f"{train}/b/1.jpg", f"{val}/b/2.jpg", f"{test}/a/3.jpg"), 9)
    assert plan.classes == ("a", "b")
    assert everything(plan) == [("test", "a/3.jpg", 0), ("train", "a/1.jpg", 0), ("train", "b/1.jpg", 1),
                                ("val", "b/2.jpg", 1)]  # fmt: skip


def test_classes_may_be_named_like_splits(tmp_path: Path) -> None:
    """CIFAR-100 has a class `train`."""
    plan = sources.plan(fill(tmp_path, "apple/1.jpg", "train/1.jpg"), 9, "classes")
    assert everything(plan) == [("train", "apple/1.jpg", 0), ("train", "train/1.jpg", 1)]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    plan = sources.plan(fill(tmp_path, "1.jpg", "2.PNG", "Thumbs.db", "README.md", "3.heic"), 9)
    assert (plan.layout, plan.classes) == ("flat", ())
    assert everything(plan) == [("train", "1.jpg", -1), ("train", "2.PNG", -1)]
    assert plan.passed_over == {".db": 1, ".md": 1, ".heic": 1}
    plan = sources.plan(fill(tmp_path / "b", "train/1.jpg", "test/2.jpg"), 9)
    assert everything(plan) == [("test", "2.jpg", -1), ("train", "1.jpg", -1)]


def test_folders_of_different_depths_are_read_flat_on_request(tmp_path: Path) -> None:
    plan = sources.plan(fill(tmp_path, "1.jpg", "a/2.jpg"), 9, "flat")
    assert everything(plan) == [("train", "1.jpg", -1), ("train", "a/2.jpg", -1)]


def test_a_flat_test_split_next_to_class_folders_is_unlabelled(tmp_path: Path) -> None:
    plan = sources.plan(fill(tmp_path, "train/a/1.jpg", "test/2.jpg"), 9)
    assert (plan.classes, everything(plan)) == (("a",), [("test", "2.jpg", -1), ("train", "a/1.jpg", 0)])


def test_files_that_are_no_images_are_passed_over_and_counted(tmp_path: Path) -> None:
    others = ["a/Thumbs.db", "b/desktop.ini", "README.md", "labels.csv", "a/meta.bin", "LICENSE"]
    plan = sources.plan(fill(tmp_path, "a/1.jpg", "b/2.jpg", *others), 9)
    assert len(everything(plan)) == 2
    assert plan.passed_over.total() == len(others)


def test_img2dataset_s_folders_are_shards_not_classes(tmp_path: Path) -> None:
    files = [
        f"{shard}/{shard}{i:04d}.{kind}" for shard in ("00000", "00001") for i in (0, 1) for kind in ("jpg", "json")
    ]
    plan = sources.plan(fill(tmp_path, *files), 9)
    assert (plan.classes, len(everything(plan)), plan.passed_over) == ((), 4, {".json": 4})


def test_tiny_imagenet_is_read_with_its_validation_labels(tmp_path: Path) -> None:
    train = [f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in ("n00000001", "n00000002") for i in (0, 1)]
    boxes = ["train/n00000001/n00000001_boxes.txt", "wnids.txt", "words.txt"]
    source = fill(tmp_path, *train, *boxes, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG")
    with pytest.raises(SourceError, match=r"val_annotations\.txt is needed for the labels of 2 validation images"):
        sources.plan(source, 9)
    (tmp_path / "val/val_annotations.txt").write_text(
        "val_0.JPEG\tn00000002\t0\t0\t9\t9\nval_1.JPEG\tn00000001\t0\t0\t9\t9\n"
    )
    plan = sources.plan(source, 9)
    assert (plan.layout, plan.classes) == ("tiny-imagenet", ("n00000001", "n00000002"))
    assert everything(plan) == [
        ("test", "images/test_0.JPEG", -1), ("train", "n00000001_0", 0), ("train", "n00000001_1", 0),
        ("train", "n00000002_0", 1), ("train", "n00000002_1", 1), ("val", "images/val_0.JPEG", 1),
        ("val", "images/val_1.JPEG", 0),
    ]  # fmt: skip


def test_a_file_that_changed_since_it_was_listed_is_an_error(tmp_path: Path) -> None:
    plan = sources.plan(fill(tmp_path, "a/1.jpg"), 9)
    for data in (b"longer than it was", b"cut"):
        (tmp_path / "a/1.jpg").write_bytes(data)
        with pytest.raises(SourceError, match=r"a/1\.jpg has changed since it was listed"):
            everything(plan)


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    storage.write(f"{tmp_path}/a/a/1.jpg", pointer)
    assert "git lfs pull" in str(everything(sources.plan(f"{tmp_path}/a", 9))[0][2])
    for name in ("train-0.tar", "train-0.parquet"):
        storage.write(f"{tmp_path}/{name[:9]}/{name}", pointer)
        with pytest.raises(SourceError, match="git lfs pull"):
            sources.plan(f"{tmp_path}/{name[:9]}", 9)


def test_a_name_that_is_not_utf_8_has_an_escaped_key(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg")
    os.rename(tmp_path / "a/1.jpg", os.fsencode(tmp_path / "a") + b"/caf\xe9.jpg")
    assert everything(sources.plan(str(tmp_path), 9)) == [("train", "a/caf\\xe9.jpg", 0)]


def test_a_fifo_is_passed_over_and_a_dangling_link_is_named(tmp_path: Path) -> None:
    source = fill(tmp_path, "a/1.jpg")
    os.mkfifo(tmp_path / "a/2.jpg")
    assert everything(sources.plan(source, 9)) == [("train", "a/1.jpg", 0)]
    (tmp_path / "a/3.jpg").symlink_to("nowhere")
    with pytest.raises(IgptError, match=r"a/3\.jpg is a link to nowhere, which does not exist"):
        sources.plan(source, 9)


# ------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize(
    ("pattern", "n"),
    [
        ("train-{000..002}.tar", 3),
        ("train-{000,002}.tar", 2),
        ("*.tar", 4),
        ("train-00[01].tar", 2),
        ("train-001.tar", 1),
        ("{train-000,val-000}.tar", 2),
    ],
)
def test_a_source_may_be_a_pattern_or_one_file(pattern: str, n: int, place: str, tmp_path: Path) -> None:
    for name in ("train-000", "train-001", "train-002", "val-000"):
        data = tar(tmp_path / "t.tar", {f"{name}.jpg": b"x", f"{name}.cls": b"0"})
        storage.write(storage.join(place, "shards", f"{name}.tar"), data)
    plan = sources.plan(storage.join(place, "shards", pattern), 9)
    assert len(everything(plan)) == len(plan.units) == n


def test_a_missing_file_of_a_pattern_is_named(tmp_path: Path) -> None:
    tar(tmp_path / "train-000.tar", {"1.jpg": b"x"})
    with pytest.raises(SourceError, match=r"names 2 files, but 1 of them do not exist, such as .*train-001\.tar"):
        sources.plan(f"{tmp_path}/train-{{000..001}}.tar", 9)


def test_a_folder_whose_name_has_special_characters_is_itself(tmp_path: Path) -> None:
    plan = sources.plan(fill(tmp_path / "set[1]{a}", "a/1.jpg"), 9)
    assert everything(plan) == [("train", "a/1.jpg", 0)]


def test_nested_braces_are_expanded() -> None:
    assert sorted(set(listing.expand_braces("{a,b{1..2}}/x-{09..10}.tar"))) == [
        "a/x-09.tar", "a/x-10.tar", "b1/x-09.tar", "b1/x-10.tar", "b2/x-09.tar", "b2/x-10.tar"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ archives


def test_keys_with_dots_are_samples_of_their_own(tmp_path: Path) -> None:
    names = ["0001", "v1.2_0002", "0003", "img.small.0004", "img.small.0005"]
    files = {
        f"{name}.{kind}": (b"x" if kind == "jpg" else b"%d" % i)
        for i, name in enumerate(names)
        for kind in ("jpg", "cls")
    }
    tar(tmp_path / "train-0.tar", files)
    read = everything(sources.plan(str(tmp_path), 9))
    assert read == [("train", f"{name}.jpg", i) for i, name in enumerate(names)]


def test_other_images_of_a_sample_are_passed_over_or_named(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", {
        "1.jpg": b"x", "1.seg.png": b"mask", "1.cls": b"0",
        "2.left.jpg": b"l", "2.right.jpg": b"r", "2.cls": b"1",
        "3.small.jpg": b"x", "3.cls": b"1",
    })  # fmt: skip
    passed_over: Counter[str] = Counter()
    read = everything(sources.plan(str(tmp_path), 9), passed_over)
    assert passed_over == {".seg.png": 1}
    assert [(key, label) for _, key, label in read] == [
        ("1.jpg", 0), ("2.left.jpg", "shares the label of 2 with 1 other images"),
        ("2.right.jpg", "shares the label of 2 with 1 other images"), ("2", "has a label, but no image"),
        ("3.small.jpg", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("extra", [{}, {"1.json": b'{"caption": "a cat", "url": "x"}', "1.txt": b"a cat"}])
def test_shards_without_labels_are_read_without_labels(extra: dict[str, bytes], tmp_path: Path) -> None:
    tar(tmp_path / "00000.tar", {"1.jpg": b"x", **extra, "2.jpg": b"y"})
    (tmp_path / "00000.parquet").write_bytes(b"img2dataset's table of metadata")
    passed_over: Counter[str] = Counter()
    plan = sources.plan(str(tmp_path), 9)
    assert plan.classes == ()
    assert everything(plan, passed_over) == [("train", "1.jpg", -1), ("train", "2.jpg", -1)]
    assert passed_over == ({".txt": 1} if extra else {})
    assert plan.passed_over == {".parquet": 1}


def test_a_label_after_shards_without_labels_is_an_error(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", {"1.jpg": b"x"})
    tar(tmp_path / "train-1.tar", {"2.jpg": b"x", "2.cls": b"1"})
    with pytest.raises(SourceError, match=r"has label 1, but the beginning of the source has no labels"):
        everything(sources.plan(str(tmp_path), 9))


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train-0.tar.xz", "train-0.tar.zst", "train-0.tar"])
def test_compressed_archives_are_read_and_damage_is_detected(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = {
        f"{i}.{kind}": rng.bytes(60_000) if kind == "jpg" else b"%d" % i for i in range(9) for kind in ("jpg", "cls")
    }
    data = tar(tmp_path / "plain", files)
    (tmp_path / "plain").unlink()
    compress = {"xz": lzma.compress, "zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    packed = compress.get(name.rpartition(".")[2], gzip.compress)(data)
    (tmp_path / name).write_bytes(packed)
    plan = sources.plan(str(tmp_path), 9)
    assert [image.data for image in sources.read(plan.units[0]) if isinstance(image, Image)] == [
        files[f"{i}.jpg"] for i in range(9)
    ]
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(SourceError, match=r"is damaged or cut|is cut|has changed"):
        everything(sources.plan(str(tmp_path), 9))
    if name.endswith("gz"):
        (tmp_path / name).write_bytes(packed[:-8] + b"\0\0\0\0" + packed[-4:])
        with pytest.raises(SourceError, match="is damaged or cut: CRC check failed"):
            everything(sources.plan(str(tmp_path), 9))


def test_class_tars_are_classes(tmp_path: Path) -> None:
    for wnid in ("n00000002", "n00000001"):
        tar(tmp_path / f"a/train/{wnid}.tar", {f"._{wnid}_1.JPEG": b"mac", f"{wnid}_1.JPEG": b"x"})
    passed_over: Counter[str] = Counter()
    plan = sources.plan(str(tmp_path / "a"), 9)
    assert (plan.layout, plan.classes) == ("class-tars", ("n00000001", "n00000002"))
    assert everything(plan, passed_over) == [("train", "n00000001_1", 0), ("train", "n00000002_1", 1)]
    assert passed_over == {"AppleDouble (._*)": 2}
    for name in ("cat", "dog"):
        tar(tmp_path / f"b/{name}.tar", {"1.jpg": b"x"})
    with pytest.raises(SourceError, match=r"\(cat, dog\): add --layout class-tars"):
        sources.plan(str(tmp_path / "b"), 9)
    read = everything(sources.plan(str(tmp_path / "b"), 9, "class-tars"))
    assert read == [("train", "cat/1.jpg", 0), ("train", "dog/1.jpg", 1)]


def test_classes_txt_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", {"1.jpg": b"x", "1.cls": b"cat"})
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    assert sources.plan(str(tmp_path), 9).classes == ("cat", "dog")


# ------------------------------------------------------------------------------------------------ Parquet

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CELLS = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": b"two", "path": "2.jpg"}]


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ({"img": pa.array(CELLS, STRUCT), "label": [1, 0]}, (), [1, 0]),
        ({"img": pa.array(CELLS, STRUCT), "fine_label": [1, 0], "coarse_label": [5, 6]}, (), [1, 0]),
        ({"photo": [b"one", b"two"], "label": ["dog", "cat"]}, (), [1, 0]),
        ({"x": [b"one", b"two"], "species": ["dog", "cat"]}, ("label=species",), [1, 0]),
        ({"x": [b"one", b"two"], "y": [b"one", b"two"], "z": [1, 0]}, ("image=y", "label=z"), [1, 0]),
        ({"image": pa.array([b"one", b"two"], pa.large_binary())}, (), [-1, -1]),
        ({"image": pa.array([b"one", b"two"]).cast(pa.binary_view()), "label": [-1, -1]}, (), [-1, -1]),
        ({"image": [b"one", b"two"], "label": pa.array(["b", "a"]).dictionary_encode()}, (), [1, 0]),
        ({"image": [b"one", b"two"], "label": [1.0, float("nan")]}, (), [1, -1]),
        ({"image": [{"bytes": b"one", "path": None}] * 2, "label": [1, 0]}, (), [1, 0]),
    ],
)
def test_usual_columns_are_recognised_and_others_are_named(
    columns: dict[str, list], options: tuple[str, ...], expected: list[int], tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    plan = sources.plan(str(tmp_path), 9, columns=options)
    assert [label for *_, label in everything(plan)] == expected


def test_another_choice_of_columns_is_another_unit(tmp_path: Path) -> None:
    """Otherwise a repeated preparation would reuse shards with the labels of the other column."""
    pq.write_table(pa.table({"image": [b"x"] * 2, "fine_label": [0, 1], "coarse": [1, 0]}), tmp_path / "0.parquet")
    plans = [sources.plan(str(tmp_path), 9, columns=columns) for columns in ((), ("label=coarse",))]
    assert plans[0].units[0].digest != plans[1].units[0].digest


def test_unknown_and_ambiguous_columns_are_errors(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [b"x"], "b": [b"x"]}), tmp_path / "0.parquet")
    with pytest.raises(SourceError, match="name another with --columns image=NAME"):
        sources.plan(str(tmp_path), 9)
    with pytest.raises(SourceError, match="but --columns names 'c'"):
        sources.plan(str(tmp_path), 9, columns=("image=c",))


def test_a_column_that_expands_without_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive bomb: kilobytes that would decompress to gigabytes."""
    monkeypatch.setattr(sources.parquet, "MAX_CHUNK", 1 << 20)
    pq.write_table(
        pa.table({"image": [b"\0" * (4 << 20)]}), tmp_path / "0.parquet", compression="zstd", use_dictionary=False
    )
    with pytest.raises(SourceError, match="would decompress to"):
        everything(sources.plan(str(tmp_path), 9))


# ------------------------------------------------------------------------------------------------ CIFAR


@pytest.mark.parametrize("n", [10, 100])
def test_cifar_s_binary_version_is_read_pixel_by_pixel(n: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (7, 3, 32, 32), np.uint8)
    labels = rng.integers(0, n, (7, 1 if n == 10 else 2), np.uint8) % n
    records = np.concatenate([labels, planes.reshape(7, -1)], axis=1).tobytes()
    length = len(records) // 7
    names = {10: ("data_batch_1.bin", "test_batch.bin", "batches.meta.txt")}.get(
        n, ("train.bin", "test.bin", "fine_label_names.txt")
    )
    (tmp_path / names[0]).write_bytes(records[: 5 * length])
    (tmp_path / names[1]).write_bytes(records[5 * length :])
    (tmp_path / names[2]).write_text("".join(f"c{i}\n" for i in range(n)))
    plan = sources.plan(str(tmp_path), 2)
    assert (plan.layout, len(plan.classes), len(plan.units)) == ("cifar", n, 4)
    images = [image for unit in plan.units[1:] + plan.units[:1] for image in sources.read(unit)]
    assert all(isinstance(image, Image) for image in images)
    assert [image.label for image in images if isinstance(image, Image)] == labels[:, -1].tolist()
    for image, pixels in zip(images, planes, strict=True):
        assert isinstance(image, Image)
        decoded = np.asarray(Picture.open(io.BytesIO(image.data)))
        np.testing.assert_array_equal(decoded, pixels.transpose(1, 2, 0))


def test_cifar_s_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="download the binary version"):
        sources.plan(fill(tmp_path, "data_batch_1", "test_batch", "batches.meta", "readme.html"), 9)


# ------------------------------------------------------------------------------------------------ all cases of a kind


SHARED: dict[str, tuple[Layout | None, int]] = {
    "classtars": ("class-tars", 2), "onlyvalidation": ("folders", 3), "pq_binary": ("parquet", 3),
    "pq_img": ("parquet", 3), "pq_minus1": ("parquet", 3), "pq_nolabel": ("parquet", 3), "pq_pandas": ("parquet", 3),
    "pq_strlabel": ("parquet", 3), "pq_view": ("parquet", 3), "tars_apple": ("tars", 2), "thumbs": ("folders", 46),
    "wds_bom": ("webdataset", 1), "wds_gz_as_tar": ("webdataset", 3), "wds_nolabel": ("webdataset", 3),
    "wds_somedots": ("webdataset", 4), "wds_targz": ("webdataset", 3),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_sources_from_bug_reports_are_read(name: str, shared: Path) -> None:
    plan = sources.plan(str(shared / "cases/sources" / name), 1000)
    assert (plan.layout, len([label for *_, label in everything(plan) if isinstance(label, int)])) == SHARED[name]


@pytest.mark.parametrize("name", ["parent", "tiny", "valflat"])
def test_ambiguous_sources_from_bug_reports_are_refused(name: str, shared: Path) -> None:
    with pytest.raises(IgptError, match=r"--source|val_annotations|--layout"):
        sources.plan(str(shared / "cases/sources" / name), 1000)


def test_a_parquet_bomb_from_a_bug_report_is_refused(shared: Path) -> None:
    with pytest.raises(SourceError, match="would decompress to 3649044875"):
        everything(sources.plan(str(shared / "cases/attacks/parquet_bomb"), 1000))
