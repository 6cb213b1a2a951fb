"""The GPU benchmark of learning at toy size: all its phases on the CPU, packed images, and releases in parts."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import cifar, gpu_learn, release_parts
from benchmarks.gpu_learn import Learn, LearnConfig, Phase
from benchmarks.learn_evaluation import with_mirror_images
from igpt_ray import weights
from igpt_ray.data.token_store import tokens_of
from igpt_ray.model.image_gpt import Block

N_PX, TRAIN, TEST = 8, 96, 16


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of two classes, dark and light, in CIFAR's folders."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in (("train", TRAIN), ("test", TEST)):
        for i in range(n):
            name, level = (("dark", 60), ("light", 190))[i % 2]
            path = root / split / name / f"{i:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(-30, 30, (N_PX, N_PX, 3))
            Image.fromarray((level + noise).astype(np.uint8)).save(path, quality=90)
    return root


@pytest.fixture(scope="module")
def packed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    sizes = cifar.pack(str(images), str(folder))
    assert {split: size["images"] for split, size in sizes.items()} == {"train": TRAIN, "test": TEST}
    return folder


def settings(packed: Path, folder: Path, **changes: object) -> LearnConfig:
    size = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_px": N_PX, "batch_size": 16, "views": 2, "steps": 12}
    places = {"packed": str(packed), "out": str(folder / "out"), "work": str(folder / "work")}
    return LearnConfig(**(places | size | changes))


@pytest.fixture(scope="module")
def finished(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LearnConfig, dict]:
    s = settings(packed, tmp_path_factory.mktemp("learn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("igpt_ray.storage.CACHE", Path(s.work, "cache"))
        patch.setattr(gpu_learn, "SPEED_STEPS", 6)
        return s, gpu_learn.learn(s)


def test_all_phases_report_their_results(finished: tuple[LearnConfig, dict]) -> None:
    s, results = finished
    errors = {phase: results[phase]["error"] for phase in s.phases if "error" in results[phase]}
    assert not errors
    assert json.loads(Path(s.out, "learn.json").read_text()).keys() == results.keys() >= set(s.phases)
    for recipe in ("paper", "modern"):
        assert results[recipe]["step"] == s.steps
        assert [line["step"] for line in results[recipe]["curve"]][-1] == s.steps
        assert results[recipe]["test_nats_per_token"] < np.log(512)
    assert results["probe"]["modern"]["five_layers_mirrored"]["accuracy"] > 0.9
    assert results["probe"]["modern"]["layer"] in range(3)
    assert "best_layer_mirrored" not in results["probe"]["paper"]
    assert results["finetune"]["test"]["accuracy"] > 0.75
    assert np.sum(results["finetune"]["confusion"]) == TEST
    with Image.open(Path(s.out, "sheet.png")) as sheet:
        assert sheet.width > sheet.height / 2


def test_recipes_differ_in_the_optimiser_and_the_modern_settings_only(packed: Path, tmp_path: Path) -> None:
    s = settings(packed, tmp_path)
    tokens = cifar.unpack(s.packed, s.work, s.n_px, "centre")
    paper, modern = (
        gpu_learn.pretrain_config(s, recipe, tokens, 20, False).model_dump() for recipe in ("paper", "modern")
    )
    differing = {
        f"{section}.{name}"
        for section in ("model", "optim", "data", "workers")
        for name in paper[section]
        if paper[section][name] != modern[section][name]
    }
    assert differing == {"model.qk_norm", "model.rotary", "optim.muon_lr", "optim.schedule"}


def test_a_release_in_parts_is_a_release(
    finished: tuple[LearnConfig, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts can be joined here or by `cat | tar x`, and a later call fine-tunes from them."""
    s, results = finished
    trained = gpu_learn.releases_of(s)["modern"]
    monkeypatch.setattr(release_parts, "PART_BYTES", 20_000)
    names = release_parts.write_parts(trained, str(tmp_path), "modern")
    sizes = [Path(tmp_path, name).stat().st_size for name in names]
    assert len(sizes) > 2
    assert max(sizes) <= 20_000
    Path(tmp_path, "joined.tar").write_bytes(b"".join(Path(tmp_path, name).read_bytes() for name in names))
    with tarfile.open(tmp_path / "joined.tar") as tar:
        assert sorted(tar.getnames()) == ["README.md", "config.json", "model.safetensors", "palette.npy"]
    again = settings(Path(s.packed), tmp_path, release=str(tmp_path))
    joined, original = (weights.load_release(uri) for uri in (gpu_learn.releases_of(again)["modern"], trained))
    for name, weight in original.model.state_dict().items():
        assert torch.equal(joined.model.state_dict()[name], weight.bfloat16().float())
    assert results["modern"]["parts"] == ["modern.part0"]


def test_packed_images_have_the_tokens_of_their_files(images: Path, packed: Path, tmp_path: Path) -> None:
    """The packed bytes are those of the files, and both stores of a call hold out the same images."""
    store = cifar.unpack(str(packed), str(tmp_path), N_PX, "centre")
    palette, keys = store.palette(), set()
    for split in ("train", "holdout", "test"):
        for table in store.read_split(split):
            for key, label, tokens in zip(
                table["key"].to_pylist(), table["label"].to_pylist(), tokens_of(table), strict=True
            ):
                keys.add(key)
                assert store.manifest.classes[label] == Path(key).parent.name
                error = np.abs(
                    palette.decode(tokens).reshape(N_PX, N_PX, 3) - np.asarray(Image.open(images / key), int)
                )
                assert error.mean() < 16
    assert len(keys) == TRAIN + TEST
    views = cifar.unpack(str(packed), str(tmp_path), N_PX, "random", 2)
    held_out = [{key for table in s.read_split("holdout") for key in table["key"].to_pylist()} for s in (store, views)]
    assert held_out[0] == held_out[1]
    assert 0 < len(held_out[0]) < TRAIN / 4


def test_an_image_is_followed_by_its_mirror_image() -> None:
    tokens = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], np.uint16)
    expected = [[0, 1, 2, 3], [1, 0, 3, 2], [4, 5, 6, 7], [5, 4, 7, 6]]
    assert with_mirror_images(tokens, 2).tolist() == expected


def test_a_failed_phase_keeps_the_others(
    finished: tuple[LearnConfig, dict], packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A phase without the release that it needs is reported in learn.json."""
    monkeypatch.setattr("igpt_ray.storage.CACHE", tmp_path / "cache")
    s = settings(packed, tmp_path, phases=("sheet", "paper"), steps=2)
    results = gpu_learn.learn(s)
    assert "add the phase modern before, or set --release" in results["sheet"]["error"]
    assert results["paper"]["step"] == 2
    assert json.loads(Path(s.out, "learn.json").read_text())["paper"]["step"] == 2


def test_training_continues_without_compilation_if_it_fails(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    s = settings(packed, tmp_path)
    monkeypatch.setattr("igpt_ray.storage.CACHE", tmp_path / "cache")
    tokens = cifar.unpack(s.packed, s.work, s.n_px, "centre")

    def compile_of_blocks_fails(function: Callable[..., object], **options: object) -> Callable[..., object]:
        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("no kernel for this block")

        return fail if isinstance(getattr(function, "__self__", None), Block) else function

    monkeypatch.setattr(torch, "compile", compile_of_blocks_fails)
    steps_per_second, compiled = gpu_learn.speed(
        lambda steps, compiled: gpu_learn.pretrain_config(s, "modern", tokens, steps, True), torch.device("cpu")
    )
    assert steps_per_second > 0
    assert not compiled
    assert "no kernel for this block" in caplog.text


def test_the_time_is_divided_over_the_phases_that_are_left(packed: Path, tmp_path: Path) -> None:
    """Training phases that each use exactly their time leave what is reserved for the other phases."""
    phases: tuple[Phase, ...] = ("modern", "paper", "probe", "finetune", "sheet")
    store = cifar.unpack(str(packed), str(tmp_path), N_PX, "centre")
    now, results = 0.0, dict[str, object]()
    learn = Learn(settings(packed, tmp_path, phases=phases), torch.device("cpu"), 500.0, store, store, results, {})
    for phase in phases:
        if phase in gpu_learn.SHARES:
            seconds = learn.time_for(phase, now)
            assert seconds > 0
            now += seconds
        now += gpu_learn.EVALUATION_S.get(phase, 0)
        results[phase] = {}
        if phase == "modern":
            modern, now = seconds, now + gpu_learn.STARTUP_S
        elif phase == "paper":
            assert seconds == pytest.approx(modern)
            now += gpu_learn.STARTUP_S
    assert now == pytest.approx(500)


def test_it_is_a_part_of_the_gpu_benchmark(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part runs the selected phases, and reports the result of each."""

    folder = packed

    class HereConfig(LearnConfig):
        packed: str = str(folder)
        work: str = str(tmp_path / "work")

    class Part:
        toy, only, out, seconds_left = True, ("paper",), tmp_path / "out", 60.0

        def __init__(self) -> None:
            self.report: dict[str, object] = {}

        def add(self, name: str, value: object) -> None:
            self.report[name] = value

    monkeypatch.setattr(gpu_learn, "LearnConfig", HereConfig)
    monkeypatch.setattr("igpt_ray.storage.CACHE", tmp_path / "cache")
    monkeypatch.setattr(gpu_learn, "SPEED_STEPS", 6)
    part = Part()
    gpu_learn.learn_part(part)
    assert part.report["paper"]["step"] == 5
    assert "modern" not in part.report
