"""Fine-tuning without Ray: augmentation, initial weights, the released weights, and resuming."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import listing_of, manifest_of, random_model
from PIL import Image, ImageOps

from igpt_ray import storage, weights
from igpt_ray.data import token_store
from igpt_ray.data.augment import Augment, shifted
from igpt_ray.data.loader import Batch, SplitCache, global_batch, share
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat, TokenStore, tokens_of
from igpt_ray.errors import TokenStoreError
from igpt_ray.evaluate import features, linear_probe
from igpt_ray.evaluate.likelihood import class_logits
from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train import checkpoint, finetune, loop, metrics, optim
from igpt_ray.train.config import FinetuneConfig, FinetuneRunConfig

CPU = torch.device("cpu")
STEPS, LOOK = 40, 4


@pytest.fixture
def classes(tmp_path: Path, palette: Palette, kind: TokenFormat) -> TokenStore:
    """24 dark and bright training images, and 9 held-out images with random labels."""
    root, rng = str(tmp_path / "classes"), np.random.default_rng(2)
    palette.save(storage.join(root, "palette.npy"))
    listed = []
    for split, rows in (("holdout", 9), ("train", 24)):
        labels = np.arange(rows) % 2
        tokens = (rng.integers(0, 8, (rows, kind.n_positions)) + 8 * labels[:, None]).astype(np.uint16)
        told = labels if split == "train" else rng.permutation(labels)
        keys = [f"{split}/{row}.png" for row in range(rows)]
        data = token_store.encode(keys, told.tolist(), tokens, kind, {"unit": "0", "split": split, "view": "0"})
        path = f"{split}/00000-v0.parquet"
        storage.write(storage.join(root, path), data)
        listed.append(listing_of(path, split, 0, rows, data))
    return token_store.commit(root, manifest_of(kind, listed))


def released(folder: Path, store: TokenStore, **shape: Any) -> str:
    uri = str(folder / "pretrained")
    model = random_model(std=0.15, n_layer=2, **shape)
    about = weights.ReleaseConfig(
        format=weights.FORMAT, model=model.config, kind=store.kind, sha256="", classes=["cat", "dog"], trained={}
    )
    weights.save_release(uri, model.state_dict(), store.palette(), about)
    return uri


def settings_for(store: TokenStore, folder: Path, name: str = "run", **changes: dict[str, Any]) -> FinetuneRunConfig:
    shape = changes.pop("shape", {})
    sections: dict[str, Any] = {
        "tune": {"pad": 1, "flip": False, "patience": 3},
        "optim": {"lr": 1e-2, "batch_size": 5, "steps": STEPS, "warmup_steps": 2, "schedule": "constant"},
        "workers": {"micro_batch": 2, "precision": "float32", "compile": False},
        "run": {"root": str(folder / "runs"), "name": name, "checkpoint_every": 8, "log_every": 2, "keep_every": 8}
        | {"validate_every": LOOK},
    }
    for section, change in changes.items():
        sections[section] |= change
    release = str(folder / "pretrained") if (folder / "pretrained").exists() else released(folder, store, **shape)
    model = weights.load_config(release).model.model_copy(update={"n_class": 2})
    settings = FinetuneConfig.model_validate({"release": release, "tokens": store.root, **sections})
    return settings.training(model)


def lines_of(run: str) -> list[dict[str, Any]]:
    timed = ("time", "tokens_per_second", "data_wait", "checkpoint_stall", "evaluation", "memory_gb")
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics.read(run)]


# ------------------------------------------------------------------------------------------------ what is changed


@pytest.mark.parametrize("mirrored", [False, True])
def test_augmented_tokens_equal_pillow_s_augmented_pixels(palette: Palette, mirrored: bool) -> None:
    """The padding, the order of rows and columns, and the order of mirror and crop are the same."""
    tokens = np.random.default_rng(0).integers(0, len(palette), (1, 64)).astype(np.uint16)
    picture = Image.fromarray(palette.decode(tokens.reshape(8, 8)))
    whole = np.pad(np.asarray(ImageOps.mirror(picture) if mirrored else picture), ((3, 3), (3, 3), (0, 0)), "reflect")
    for down in range(-3, 4):
        for right in range(-3, 4):
            seen = shifted(tokens, 8, np.array([down]), np.array([right]), np.array([mirrored]))
            expected = whole[3 + down : 11 + down, 3 + right : 11 + right]
            np.testing.assert_array_equal(palette.decode(seen.reshape(8, 8)), expected)


def test_augmentation_depends_on_epoch_and_row_alone() -> None:
    """Not on the number of workers or the micro-batch."""
    tokens = np.arange(20 * 16).reshape(20, 16).astype(np.uint16)
    augment = Augment(n_px=4, pad=2, flip=True)
    batch = global_batch(seed=3, step=5, batch_size=9, n_rows=20)
    whole = augment(tokens[batch.rows], 3, batch)
    parts = [share(batch, rank, 3) for rank in range(3)]
    np.testing.assert_array_equal(np.concatenate([augment(tokens[p.rows], 3, p) for p in parts]), whole)
    later = Batch(batch.epochs + 1, batch.rows)
    assert (augment(tokens[batch.rows], 3, later) != whole).any()


def test_all_shifts_and_mirrors_are_equally_likely() -> None:
    n = 9000
    tokens = np.tile(np.arange(16, dtype=np.uint16), (n, 1))
    seen = Augment(n_px=4, pad=1, flip=True)(tokens, 0, Batch(np.zeros(n, np.int64), np.arange(n)))
    _, counts = np.unique(seen, axis=0, return_counts=True)
    assert len(counts) == 9 * 2
    assert np.abs(counts - n / 18).max() < 5 * (n / 18) ** 0.5


def test_labels_belong_to_their_images_and_none_may_be_missing(
    classes: TokenStore, tmp_path: Path, kind: TokenFormat
) -> None:
    split = SplitCache(classes, "train", labelled=True)
    batch = global_batch(seed=1, step=3, batch_size=7, n_rows=24)
    np.testing.assert_array_equal(split.labels_of(batch), (split[batch] >= 8).all(1))

    root = str(tmp_path / "unlabelled")
    data = token_store.encode(
        ["a", "b"], [0, -1], split.views[0][:2], kind, {"unit": "0", "split": "train", "view": "0"}
    )
    storage.write(storage.join(root, "train/00000-v0.parquet"), data)
    store = token_store.commit(root, manifest_of(kind, [listing_of("train/00000-v0.parquet", "train", 0, 2, data)]))
    with pytest.raises(TokenStoreError, match="1 images of train have no label"):
        SplitCache(store, "train", labelled=True)


def test_the_learning_rate_is_constant() -> None:
    """Fine-tuning has no cosine schedule (paper, section 3.3)."""
    section = FinetuneConfig(release="r", tokens="t").optim
    rates = [optim.lr_at(step, section) for step in range(section.steps)]
    assert rates[: section.warmup_steps] == sorted(rates[: section.warmup_steps])
    assert set(rates[section.warmup_steps - 1 :]) == {section.lr}


# ------------------------------------------------------------------------------------------------ the run


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_the_first_evaluation_is_of_the_release_and_the_run_learns_the_classes(
    device: torch.device, process_group: None, classes: TokenStore, tmp_path: Path, objective: str
) -> None:
    """The run starts with the weights of the release, and trains its head with the right labels."""
    tiny_steps = {"lr": 1e-12, "steps": LOOK}
    still = settings_for(classes, tmp_path, "still", shape={"objective": objective}, optim=tiny_steps)
    report = loop.train(still, device)
    given, found = (weights.load_release(uri).model for uri in (still.release, report["release"]))
    for name, weight in given.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=0, atol=1e-9)

    learnt = loop.train(settings_for(classes, tmp_path, "learnt", tune={"patience": 99}), device)
    assert learnt["accuracy"] > 0.9
    assert learnt["step"] == STEPS


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_a_head_initialised_with_a_probe_predicts_like_the_probe(
    device: torch.device, process_group: None, classes: TokenStore, tmp_path: Path, objective: str
) -> None:
    """The head has neither bias nor standardisation: both are folded into its weights."""
    cfg = settings_for(classes, tmp_path, tune={"head": "probe"}, shape={"objective": objective})
    model = loop.build(cfg, device)[0]
    finetune.start(model, cfg)
    whole = {name: value.full_tensor().cpu() for name, value in model.state_dict().items()}
    given = weights.load_release(cfg.release).model.state_dict()
    assert all(torch.equal(whole[name], value) for name, value in given.items())
    headed = ImageGPT(cfg.model)
    headed.load_state_dict(whole)
    (table,) = classes.read_split("train")
    tokens, keys = tokens_of(table), table["key"].to_pylist()
    found = class_logits(headed, tokens, keys, 4)
    seen = linear_probe.Labelled(
        features.pooled(headed, tokens, keys, [2], "mean", 4)[..., 0, :], table["label"].to_numpy()
    )
    setting = linear_probe.select(seen, 2, cfg.seed, linear_probe.Method()).setting
    expected = linear_probe.refit(seen, 2, setting, linear_probe.Method()).logits(seen.features)
    margin, wanted = (logits[..., 1] - logits[..., 0] for logits in (found, expected))
    assert np.square(margin - wanted).mean() ** 0.5 < 0.2 * wanted.std()


def test_the_release_is_the_first_best_evaluation_and_training_stops_early(
    device: torch.device, process_group: None, classes: TokenStore, tmp_path: Path
) -> None:
    """Held-out images are not augmented, and accuracy is per image."""
    cfg = settings_for(classes, tmp_path, tune={"patience": 2})
    report = loop.train(cfg, device)
    looks = {line["step"]: line["val_accuracy"] for line in metrics.read(cfg.run.uri) if "val_accuracy" in line}
    assert report["val_accuracy"] == max(looks.values())
    assert report["best_step"] == min(step for step, accuracy in looks.items() if accuracy == max(looks.values()))
    assert report["step"] == min(report["best_step"] + 2 * LOOK, STEPS)
    assert report["step"] < STEPS
    assert checkpoint.committed_steps(cfg.run.uri)[-1] == report["step"]

    release = weights.load_release(report["release"])
    assert (release.config.model.n_class, release.config.classes) == (2, ["cat", "dog"])
    table = next(classes.read_split("holdout"))
    x = torch.from_numpy(tokens_of(table).astype(np.int64))
    loss, nats, right = losses.loss_parts(release.model, x, torch.from_numpy(table["label"].to_numpy()).long())
    best = next(line for line in metrics.read(cfg.run.uri) if line["step"] == report["best_step"])
    assert best["val_accuracy"] == pytest.approx(right.mean().item())
    assert best["val_loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert best["val_nats_per_token"] == pytest.approx(nats.mean().item(), rel=1e-5)

    written = Path(report["release"], "model.safetensors").stat().st_mtime_ns
    assert loop.train(cfg, device) == report  # finished, it has nothing to do
    assert Path(report["release"], "model.safetensors").stat().st_mtime_ns == written


def test_a_run_resumed_before_its_best_evaluation_has_the_same_release(
    device: torch.device, process_group: None, classes: TokenStore, tmp_path: Path
) -> None:
    """Patience, weights and augmentation continue where they were."""
    cfg = settings_for(classes, tmp_path, tune={"patience": 4})
    report = loop.train(cfg, device)
    bits, lines = storage.read(storage.join(report["release"], "model.safetensors")), lines_of(cfg.run.uri)
    checkpoint.rewind(cfg.run.uri, 8)
    again = loop.train(cfg, device)
    assert storage.read(storage.join(again["release"], "model.safetensors")) == bits
    assert lines_of(cfg.run.uri) == lines


def _work(rank: int, n: int, folder: str, settings: str, cache: str) -> None:
    """One of n workers."""
    torch.set_num_threads(1)
    storage.CACHE = Path(cache)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{n}", rank=rank, world_size=n)
    loop.train(FinetuneRunConfig.model_validate_json(settings), CPU)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_train_and_report_like_one(classes: TokenStore, cache: Path, tmp_path: Path) -> None:
    """All workers get the initial weights, and sums are over images, not workers."""
    told = []
    for n in (1, 2):
        steps = {"steps": 2 * LOOK, "lr": 1e-3}
        cfg = settings_for(classes, tmp_path, f"of-{n}", optim=steps, workers={"n": n, "micro_batch": 1})
        torch.multiprocessing.spawn(_work, (n, str(tmp_path), cfg.model_dump_json(), str(cache)), nprocs=n)
        told.append([value for line in lines_of(cfg.run.uri) for value in line.values()])
    assert told[1] == pytest.approx(told[0], rel=1e-4)


# ------------------------------------------------------------------------------------------------ what it knows


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_predictions_do_not_depend_on_the_batch(device: torch.device, objective: str) -> None:
    """Masks depend on the image alone, and five masks vote."""
    model = random_model(std=0.15, objective=objective, n_class=3, device=device)
    tokens = np.random.default_rng(4).integers(0, 16, (7, 16)).astype(np.uint16)
    keys = [f"{i}.png" for i in range(7)]
    logits = class_logits(model, tokens, keys, batch_size=3)
    assert logits.shape == ((7, 3) if objective == "next" else (7, 5, 3))
    np.testing.assert_allclose(class_logits(model, tokens[4:], keys[4:], batch_size=7), logits[4:], rtol=1e-4)
    x = torch.from_numpy(tokens[2:3].astype(np.int64)).to(device)
    keep = None if objective == "next" else losses.visible_masks_of_keys(["2.png"], 4, 16).to(device)
    one = logits[2] if objective == "next" else logits[2, 4]
    np.testing.assert_allclose(model.forward_with_classifier(x, keep)[1][0].cpu().numpy(), one, rtol=1e-4)
