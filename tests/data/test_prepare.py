"""Images to tokens: damaged, unreadable and existing files; splits, views, layouts and stores."""

import functools
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from igpt_ray import storage
from igpt_ray.data import pixels, prepare, sources
from igpt_ray.data.config import PixelsConfig, PrepareConfig
from igpt_ray.data.loader import SplitCache
from igpt_ray.data.make_shard import MakeShard, Task, tasks_of
from igpt_ray.data.mapper import serial_map
from igpt_ray.data.palette import Palette
from igpt_ray.data.sources import Layout
from igpt_ray.data.token_store import TokenFormat, TokenStore, parse, tokens_of
from igpt_ray.errors import SourceError, TokenStoreError
from tests.data.test_layouts import LAYOUTS, expected, real

ROOT = Path(__file__).resolve().parents[2]
PIXELS = PixelsConfig(n_px=8, crop="centre")
SAMPLED = PixelsConfig(n_px=32)


def settings_for(source: str, prepared: str, tokens: Path, **others: object) -> PrepareConfig:
    palette = storage.join(prepared, "palette.npy")
    return PrepareConfig(source=source, palette=palette, tokens=str(tokens), pixels=PIXELS, **others)


def test_a_palette_comes_with_a_report_and_a_picture(prepared: str) -> None:
    """A palette that nobody can judge, or a picture that overwrites the report."""
    report = json.loads(storage.read(storage.join(prepared, "palette.json")))
    assert (report["k"], report["device"]) == (16, "cpu")
    assert {"mse", "psnr_db", "entropy_nats", "colours_used", "made_by"} <= report.keys()
    assert pixels.decode(storage.read(storage.join(prepared, "palette.png"))).ndim == 3


def test_every_token_is_the_palette_s_nearest_colour_of_its_picture(prepared: str, digit_images: str) -> None:
    """Catches rows that slip against keys or labels, whatever the units and the actors."""
    store = TokenStore.open(storage.join(prepared, "tokens"))
    palette = store.palette()
    seen = 0
    for split in ("train", "test"):
        for table in store.read_split(split):
            for row, tokens in zip(table.select(["key", "label"]).to_pylist(), tokens_of(table), strict=True):
                data = storage.read(storage.join(digit_images, split, row["key"]))
                expected = palette.encode(pixels.centre_view(data, 8)).reshape(-1)
                assert (tokens == expected).all()
                assert store.manifest.classes[row["label"]] == row["key"].split("/")[0]
                seen += 1
    assert seen == 160


def test_a_repeat_keeps_what_is_there_and_mends_what_is_damaged(prepared: str, digit_images: str) -> None:
    tokens = Path(prepared, "tokens")
    before = TokenStore.open(str(tokens))
    whole, damaged = (tokens / shard.path for shard in before.manifest.shards[:2])
    written = whole.stat().st_mtime_ns
    content = damaged.read_bytes()
    damaged.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    report = prepare.prepare(settings_for(digit_images, prepared, tokens, shard_images=50), serial_map)
    assert report["manifest_sha256"] == before.sha256
    assert whole.stat().st_mtime_ns == written
    assert damaged.read_bytes() == content


def test_a_committed_store_is_never_overwritten_by_another(prepared: str, digit_images: str, tmp_path: Path) -> None:
    """Another size, palette or listing under the same root: refused before a byte is written."""
    tokens = Path(prepared, "tokens")
    before = {path: path.read_bytes() for path in tokens.rglob("*") if path.is_file()}
    other = tmp_path / "other.npy"
    Palette(-Palette.load(storage.join(prepared, "palette.npy")).colours).save(str(other))
    fits = settings_for(digit_images, prepared, tokens, shard_images=50)
    for change, complaint in (
        ({"pixels": PixelsConfig(n_px=4, crop="centre")}, "n_px 8, not 4"),
        ({"palette": str(other)}, "palette"),
        ({"shard_images": 49}, "another listing"),
        ({"views": 2}, "another listing"),
        ({"holdout": 0.1}, "made with holdout 0.0, not 0.1"),
        ({"pixels": PixelsConfig(n_px=8)}, "made with pixels .*centre.*, not .*random"),
    ):
        with pytest.raises(TokenStoreError, match=complaint):
            prepare.prepare(fits.model_copy(update=change), serial_map)
    assert {path: path.read_bytes() for path in tokens.rglob("*") if path.is_file()} == before


def test_a_damaged_image_is_named_and_quarantined_and_a_file_of_another_kind_is_passed_over(
    prepared: str, digit_images: str, tmp_path: Path
) -> None:
    """Over the budget the job fails and leaves nothing that a repeat trips over; within it the rest goes through."""
    source = tmp_path / "images"
    shutil.copytree(digit_images, source)
    (source / "train/3/notes").write_text("not a picture")
    (source / "train/3/notes.txt").write_text("not a picture")
    (source / "train/3/cut.png").write_bytes(next((source / "train/3").glob("*.png")).read_bytes()[:90])
    settings = settings_for(str(source), prepared, tmp_path / "tokens", shard_images=50)
    with pytest.raises(SourceError, match=r"2 of 162 images cannot be read.*3/cut\.png.*--budget"):
        prepare.prepare(settings, serial_map)
    report = prepare.prepare(settings.model_copy(update={"budget": 0.02}), serial_map)
    assert (report["images"], report["quarantined"], report["passed_over"]) == (160, 2, {".txt": 1})
    listed = "".join(path.read_text() for path in (tmp_path / "tokens/quarantine").iterdir())
    assert "3/notes" in listed
    assert "notes.txt" not in listed
    assert "starts with b'not a pictur'" in listed
    manifest = TokenStore.open(str(tmp_path / "tokens")).manifest
    left_out = {split: sum(s.statistics.quarantined for s in manifest.select(split)) for split in manifest.splits}
    assert left_out == {"test": 0, "train": 2}


def test_a_dry_run_prints_the_plan_and_writes_nothing(prepared: str, digit_images: str, tmp_path: Path) -> None:
    source = tmp_path / "images"
    shutil.copytree(digit_images, source)
    (source / "train/3/notes.txt").write_text("not a picture")
    plan = prepare.prepare(settings_for(str(source), prepared, tmp_path / "tokens", dry_run=True), serial_map)
    assert not (tmp_path / "tokens").exists()
    assert (plan["layout"], plan["classes"], plan["passed_over"]) == ("folders", 10, {".txt": 1})
    assert plan["splits"]["train"]["images"] == 120
    first = plan["splits"]["train"]["examples"][0]
    assert first["key"].startswith("0/")
    assert first["class"] == "0"


def test_one_unreadable_image_is_allowed_in_a_small_set_unless_the_budget_is_zero(
    prepared: str, digit_images: str, tmp_path: Path
) -> None:
    source = tmp_path / "images"
    shutil.copytree(digit_images, source)
    (source / "train/3/cut.png").write_bytes(b"\x89PNG\r\n\x1a\ncut")
    settings = settings_for(str(source), prepared, tmp_path / "tokens")
    with pytest.raises(SourceError, match=r"1 of 161 images cannot be read.*3/cut\.png"):
        prepare.prepare(settings.model_copy(update={"budget": 0.0}), serial_map)
    assert prepare.prepare(settings, serial_map)["quarantined"] == 1


def test_a_lossless_jpeg_among_forty_images_is_quarantined(prepared: str, digit_images: str, tmp_path: Path) -> None:
    """A real one, 16 x 16 pixels of one grey: decoding it at a reduced scale can end the process."""
    folder = tmp_path / "images" / "train" / "3"
    folder.mkdir(parents=True)
    for path in sorted(Path(digit_images, "train").rglob("*.png"))[:40]:
        shutil.copy(path, folder)
    frame, table = "ffc3 000b 08 0010 0010 01 01 11 00", f"ffc4 0014 00 01 {'00' * 15} 00"
    scan = f"ffda 0008 01 01 00 01 00 00 {'00' * 32}"
    (folder / "lossless.jpg").write_bytes(bytes.fromhex(f"ffd8 {frame} {table} {scan} ffd9"))
    settings = settings_for(str(tmp_path / "images"), prepared, tmp_path / "tokens")
    report = prepare.prepare(settings, serial_map)
    assert (report["images"], report["quarantined"]) == (40, 1)
    (listed,) = json.loads((tmp_path / "tokens/quarantine/train-00000-v0.json").read_text())
    assert listed["key"] == "3/lossless.jpg"
    assert "lossless" in listed["reason"]


def test_a_link_in_a_tar_of_images_is_quarantined(prepared: str, digit_images: str, tmp_path: Path) -> None:
    """Units of archives travel to the workers as those of folders do, and what cannot be read is counted."""
    paths = sorted(Path(digit_images, "train").glob("*/*.png"))[:6]
    (tmp_path / "images").mkdir()
    (tmp_path / "images/classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    with tarfile.open(tmp_path / "images/train-000.tar", "w") as shard:
        for path in paths:
            shard.add(path, path.name)
            label = tarfile.TarInfo(path.name.replace(".png", ".cls"))
            label.size = 1
            shard.addfile(label, io.BytesIO(path.parent.name.encode()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        shard.addfile(link)
    settings = settings_for(str(tmp_path / "images"), prepared, tmp_path / "tokens", budget=0.2)
    report = prepare.prepare(settings, serial_map)
    assert (report["images"], report["quarantined"]) == (6, 1)
    rows = TokenStore.open(str(tmp_path / "tokens")).read_split("train")
    labels = {row["key"]: row["label"] for table in rows for row in table.select(["key", "label"]).to_pylist()}
    assert labels == {path.name: int(path.parent.name) for path in paths}
    listed = "".join(path.read_text() for path in (tmp_path / "tokens/quarantine").iterdir())
    assert "is a symbolic link" in listed


def test_views_of_the_training_split_are_different_crops(prepared: str, digit_images: str, tmp_path: Path) -> None:
    random = PixelsConfig(n_px=8, crop="random")
    settings = settings_for(digit_images, prepared, tmp_path / "tokens", views=2, shard_images=200)
    prepare.prepare(settings.model_copy(update={"pixels": random}), serial_map)
    store = TokenStore.open(str(tmp_path / "tokens"))
    assert (store.manifest.views("train"), store.manifest.views("test")) == (2, 1)
    first, second = (tokens_of(store.read(store.manifest.select("train", view)[0])) for view in (0, 1))
    assert (first != second).any(axis=1).mean() > 0.9


def test_a_hold_out_is_drawn_by_key_and_can_be_folded_back(prepared: str, digit_images: str, tmp_path: Path) -> None:
    """An image on both sides or on neither, in one view here and in another there; or a part that cannot come back."""
    settings = settings_for(digit_images, prepared, tmp_path / "tokens", views=2, holdout=0.3, shard_images=30)
    report = prepare.prepare(settings.model_copy(update={"pixels": PixelsConfig(n_px=8, crop="random")}), serial_map)
    store = TokenStore.open(str(tmp_path / "tokens"))
    whole = TokenStore.open(storage.join(prepared, "tokens"))
    keys = [{split: keys_of(store, split, view) for split in ("train", "holdout", "train+holdout")} for view in (0, 1)]
    assert keys[0] == keys[1]
    assert keys[0]["train+holdout"] == keys[0]["train"] + keys[0]["holdout"]
    assert sorted(keys[0]["train+holdout"]) == sorted(keys_of(whole, "train", 0))
    assert report["splits"]["holdout"] == len(keys[0]["holdout"]) == store.manifest.rows("holdout")
    assert 0.15 < len(keys[0]["holdout"]) / len(keys[0]["train+holdout"]) < 0.45
    assert len(SplitCache(store, "train+holdout", tmp_path / "cache")) == whole.manifest.rows("train")
    again = settings_for(digit_images, prepared, tmp_path / "again", holdout=0.3, shard_images=7)
    prepare.prepare(again, serial_map)
    assert keys_of(TokenStore.open(again.tokens), "holdout", 0) == keys[0]["holdout"]


def keys_of(store: TokenStore, split: str, view: int) -> list[str]:
    return [key for shard in store.manifest.select(split, view) for key in store.read(shard)["key"].to_pylist()]


def test_a_contact_sheet_shows_what_the_tokens_say(prepared: str) -> None:
    sheet = pixels.decode(storage.read(storage.join(prepared, "tokens/train.png")))
    store = TokenStore.open(storage.join(prepared, "tokens"))
    first = store.palette().decode(tokens_of(next(store.read_split("train")))[0].reshape(8, 8))
    assert sheet.shape == (8 * 66 + 2, 8 * 66 + 2, 3)
    assert (sheet[2:66:8, 2:66:8] == first).all()


def test_statistics_add_up_to_what_a_look_at_every_image_gives(prepared: str, digit_images: str) -> None:
    store = TokenStore.open(storage.join(prepared, "tokens"))
    palette, error, size = store.palette(), 0, 0
    for path in Path(digit_images, "test").glob("*/*.png"):
        rgb = pixels.centre_view(path.read_bytes(), 8)
        error += int(((rgb.astype(int) - palette.decode(palette.encode(rgb))) ** 2).sum())
        size += path.stat().st_size
    said = [shard.statistics for shard in store.manifest.select("test")]
    assert (sum(s.squared_error for s in said), sum(s.source_bytes for s in said)) == (error, size)


@functools.cache
def tokens_of_the_sample(shared: Path) -> dict[tuple[str, str], tuple[int, bytes]]:
    """(split, key) -> (label, tokens), image by image."""
    palette = Palette.load("openai")
    return {
        (split, image.key): (
            image.label,
            palette.encode(
                pixels.configured_view(image.data, SAMPLED, pixels.FAST, split == "train", image.key, 0)
            ).tobytes(),
        )
        for split, image in expected(real(shared))
    }


@pytest.mark.parametrize("store", ["local", "bucket"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_imagenet_sample_gives_the_same_tokens_in_every_layout_and_store(
    layout: Layout, store: str, shared: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A random crop that follows a path, a label that follows an order: a store that no other can be compared with."""
    place = str(tmp_path / "images") if store == "local" else request.getfixturevalue("on_rclone")
    LAYOUTS[layout](place, real(shared))
    palette, root = Palette.load("openai"), str(tmp_path / "tokens")
    palette.save(storage.join(root, "palette.npy"))
    kind = TokenFormat(n_px=32, n_vocab=512, palette=palette.fingerprint, pipeline=pixels.FAST)
    make = MakeShard(root, kind, SAMPLED, holdout=0.04, committed={})
    found = {}
    for task in tasks_of(sources.plan(place, 30), views=1):
        for split, (data, bad) in make.make(task).items():
            assert not bad
            table = parse(data)
            for row, tokens in zip(table.select(["key", "label"]).to_pylist(), tokens_of(table), strict=True):
                found[split.replace("holdout", "train"), row["key"]] = (row["label"], tokens.tobytes())
    assert found == tokens_of_the_sample(shared)


def test_bucket_to_bucket_equals_folder_to_folder(
    prepared: str, digit_images: str, on_rclone: str, tmp_path: Path
) -> None:
    """The row function against a real S3 server, in this process (the cluster's workers have no key to it)."""
    plan = sources.plan(digit_images, 50)
    for entry in storage.walk(digit_images):
        storage.write(on_rclone + entry.uri.removeprefix(digit_images), storage.read(entry.uri))
    in_bucket = sources.plan(on_rclone, 50)
    palette = Palette.load(storage.join(prepared, "palette.npy"))
    kind = TokenStore.open(storage.join(prepared, "tokens")).kind
    made = []
    for root, units in ((storage.join(on_rclone, "tokens"), in_bucket.units), (str(tmp_path), plan.units)):
        palette.save(storage.join(root, "palette.npy"))
        make = MakeShard(root, kind, PIXELS, holdout=0.0, committed={})
        made.append([make(Task(unit, 0)) for unit in units])
    assert made[0] == made[1]
