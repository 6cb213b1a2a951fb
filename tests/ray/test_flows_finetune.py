"""Fine-tuning with Ray: what comes out is known to the other jobs; what cannot work is refused before it starts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import listing_of

from igpt_ray import storage, weights
from igpt_ray.data import token_store
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat, TokenStore, tokens_of
from igpt_ray.errors import CheckpointError, IgptError, SettingError, TokenStoreError
from igpt_ray.evaluate import linear_probe
from igpt_ray.evaluate.config import EvaluateConfig, ProbeConfig
from igpt_ray.evaluate.likelihood import class_logits
from igpt_ray.flows import evaluate
from igpt_ray.flows.config import ReportConfig
from igpt_ray.flows.finetune import finetune
from igpt_ray.flows.probe import probe_layers
from igpt_ray.flows.report import write_report
from igpt_ray.flows.serve.replica import Replica
from igpt_ray.train.config import FinetuneConfig, FinetuningConfig
from tests.train.test_finetune import released

Splits = dict[str, list[int]]


def labelled(
    root: Path, palette: Palette, kind: TokenFormat, splits: Splits, classes: tuple[str, ...] = ("cat", "dog")
) -> str:
    """A token store of random pictures, dark or bright by their labels."""
    rng, listed = np.random.default_rng(6), []
    palette.save(storage.join(str(root), "palette.npy"))
    for split, labels in sorted(splits.items()):
        tokens = (rng.integers(0, 8, (len(labels), kind.n_positions)) + 8 * np.array(labels)[:, None] % 16) % 16
        keys = [f"{split}/{row}.png" for row in range(len(labels))]
        data = token_store.encode(
            keys, labels, tokens.astype(np.uint16), kind, {"unit": "0", "split": split, "view": "0"}
        )
        path = f"{split}/00000-v0.parquet"
        storage.write(storage.join(str(root), path), data)
        listed.append(listing_of(path, split, 0, len(labels), data))
    manifest = token_store.Manifest(
        format=token_store.FORMAT, kind=kind, classes=list(classes), shards=listed, made_by={"by": "a test"}
    )
    return token_store.commit(str(root), manifest).root


GOOD: Splits = {"train": [0, 1] * 10, "holdout": [0, 1, 1, 0], "test": [1, 0, 1]}


def settings_for(tokens: str, release: str, folder: Path, **changes: Any) -> FinetuneConfig:
    sections: dict[str, Any] = {
        "tune": {"pad": 1},
        "optim": {"lr": 1e-2, "batch_size": 4, "steps": 8, "warmup_steps": 0, "schedule": "constant"},
        "run": {"root": str(folder / "runs"), "checkpoint_every": 4, "log_every": 2, "validate_every": 4},
    }
    return FinetuneConfig.model_validate({"release": release, "tokens": tokens, **(sections | changes)})


@pytest.mark.ray
@pytest.mark.parametrize("objective", ["next", pytest.param("masked", marks=pytest.mark.slow)])
def test_a_fine_tuned_release_is_evaluated_probed_and_served(
    cluster: str, tmp_path: Path, palette: Palette, kind: TokenFormat, objective: str
) -> None:
    """A head that other jobs refuse or forget; accuracy by one mask where five vote."""
    tokens = labelled(tmp_path / "tokens", palette, kind, GOOD)
    release = released(tmp_path, TokenStore.open(tokens), objective=objective)
    report = finetune(settings_for(tokens, release, tmp_path, workers={"n": 2})).line()
    both = {"release": report["release"], "tokens": tokens}

    table = next(TokenStore.open(tokens).read_split("test"))
    model = weights.load_release(report["release"]).model
    logits = class_logits(model, tokens_of(table), table["key"].to_pylist(), 64)
    judged = linear_probe.evaluate_logits(logits, table["label"].to_numpy().astype(np.int64), 2)
    said = evaluate.evaluate(EvaluateConfig(**both)).line()["classification"]
    assert said == pytest.approx({"images": 3, **judged.report()}, rel=1e-5)
    assert said["top_5"] == 1

    assert len(probe_layers(ProbeConfig(**both, out=str(tmp_path / "probe"))).layers) == 3
    if objective == "next":
        assert Replica("tuned", report["release"], {}, 1).model.config.n_class == 2
    again = finetune(settings_for(tokens, report["release"], tmp_path / "again")).line()
    assert again["n_params"] == report["n_params"]  # it goes on with the head that is there


@pytest.mark.parametrize(
    ("splits", "classes", "head", "changes", "error", "complaint"),
    [
        ({**GOOD, "train": [0, 1, -1]}, 2, 0, {}, TokenStoreError, "1 images of train have no label"),
        ({**GOOD, "holdout": [-1, 1]}, 2, 0, {}, TokenStoreError, "1 images of holdout have no label"),
        ({**GOOD, "train": [1, 1, 1]}, 2, 0, {}, TokenStoreError, "all images of train are of one class"),
        ({"train": [0, 1]}, 2, 0, {}, TokenStoreError, "no split 'holdout' in this token store: it has train"),
        (GOOD, 3, 2, {}, CheckpointError, r"has a head for 2 classes \(cat, dog\), but .* has 3 \(cat, dog, cow\)"),
        (GOOD, 2, 0, {"val_split": ""}, SettingError, "--val-split '' with --split 'train'.*prepare the store with"),
        (GOOD, 2, 0, {"split": "train+holdout"}, SettingError, "early stopping needs images that are not"),
        (GOOD, 2, 0, {"tune": {"pad": 4}}, SettingError, "--tune.pad is 4, expected at most 3"),
        (GOOD, 2, 0, {"run": {"validate_every": None}}, SettingError, "--run.validate-every is not set"),
        (GOOD, 2, 0, {"run": {"validate_every": 9}}, SettingError, "--run.validate-every 9 is more than --optim.steps"),
    ],
)
def test_impossible_settings_are_refused_before_workers_start(
    tmp_path: Path,
    palette: Palette,
    kind: TokenFormat,
    splits: Splits,
    classes: int,
    head: int,
    changes: dict[str, Any],
    error: type[IgptError],
    complaint: str,
) -> None:
    names = ("cat", "dog", "cow")[:classes]
    tokens = labelled(tmp_path / "tokens", palette, kind, splits, names)
    release = released(tmp_path, TokenStore.open(tokens), n_class=head)
    with pytest.raises(error, match=complaint):
        finetune(settings_for(tokens, release, tmp_path, **changes))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"palette": "another"}, "was trained with palette"), ({"n_px": 2}, "was trained with n_px 4, but .* has 2")],
)
def test_a_store_with_another_token_format_is_refused(
    tmp_path: Path, palette: Palette, kind: TokenFormat, change: dict[str, Any], complaint: str
) -> None:
    """A network that takes every colour for another one learns all the same, and badly."""
    ours = labelled(tmp_path / "ours", palette, kind, GOOD)
    theirs = palette
    if "palette" in change:
        theirs = Palette(palette.colours[::-1].copy())
        change = {"palette": theirs.fingerprint}
    tokens = labelled(tmp_path / "tokens", theirs, kind.model_copy(update=change), GOOD)
    release = released(tmp_path, TokenStore.open(ours))
    with pytest.raises(CheckpointError, match=complaint):
        finetune(settings_for(tokens, release, tmp_path))


@pytest.mark.ray
@pytest.mark.slow
def test_accuracies_in_the_report_belong_to_its_releases(
    cluster: str, tmp_path: Path, palette: Palette, kind: TokenFormat
) -> None:
    """Accuracy of images that were held out, or of the run from scratch under the other's name."""
    tokens = labelled(tmp_path / "tokens", palette, kind, {split: labels * 3 for split, labels in GOOD.items()})
    release = released(tmp_path, TokenStore.open(tokens))
    how = settings_for(tokens, release, tmp_path).model_dump(include=set(FinetuningConfig.model_fields))
    settings = ReportConfig.model_validate(
        {"release": release, "tokens": tokens, "out": str(tmp_path / "report"), "images": 2, "low_data": ()}
        | {"finetune": True, "finetuning": how}
    )
    assert write_report(settings)["made"][-2:] == ["finetuning/run", "finetuning/run-scratch"]
    found = json.loads((tmp_path / "report/report.json").read_text())["finetuned"]
    begun = {start: weights.load_config(said["release"]).trained["settings"]["tune"] for start, said in found.items()}
    assert {start: tune["scratch"] for start, tune in begun.items()} == {"network": False, "scratch": True}
    for said in found.values():
        asked = evaluate.evaluate(EvaluateConfig(release=said["release"], tokens=tokens)).line()
        assert said["accuracy"] == asked["classification"]["accuracy"]
        assert said["nats_per_token"] == asked["nats_per_token"]
    assert write_report(settings)["made"] == []
