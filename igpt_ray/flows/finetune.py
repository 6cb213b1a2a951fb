"""Fine-tuning on a labelled token store: validation of the settings, then a run of `flows/train.py`."""

import numpy as np

from igpt_ray import weights
from igpt_ray.data.loader import labels_in
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import CheckpointError, SettingError, TokenStoreError
from igpt_ray.flows import train
from igpt_ray.train.config import FinetuneConfig, FinetuneRunConfig
from igpt_ray.weights import ReleaseConfig


def finetune(settings: FinetuneConfig) -> train.TrainResult:
    """Train until the held-out accuracy stops improving; the release has the best weights. Returns the last metrics."""
    run, store, about = check(settings)
    evaluation = {"val_split": settings.val_split, "val_images": settings.val_images}
    evaluation |= {"validate_every": settings.run.validate_every}
    return train.fit(run, store, release=about.sha256, tune=settings.tune.model_dump(), **evaluation)


def check(settings: FinetuneConfig) -> tuple[FinetuneRunConfig, TokenStore, ReleaseConfig]:
    """Validate the settings before workers start. Returns the run, its token store and the initial release."""
    about = weights.load_config(settings.release)
    store = TokenStore.open(settings.tokens)
    weights.check_kind(about.kind, store.kind, settings.tokens)
    check_head(about, settings.release, store)
    run = settings.training(about.model.model_copy(update={"n_class": len(store.manifest.classes)}))
    _check_settings(run)
    train.check(run)
    _check_labels(store, settings)
    return run, store, about


def check_head(about: ReleaseConfig, release: str, store: TokenStore) -> None:
    """Raise `CheckpointError` if the release has a head for other classes than the store's."""
    ours, theirs = about.classes, store.manifest.classes
    if about.model.n_class and ours != theirs:
        raise CheckpointError(
            f"{release} has a head for {len(ours)} classes ({_some(ours)}), but {store.root} has {len(theirs)}"
            f" ({_some(theirs)}): start from the pretrained release"
        )


def _some(classes: list[str]) -> str:
    return ", ".join(classes[:3]) + (" ..." if len(classes) > 3 else "")


def _check_settings(run: FinetuneRunConfig) -> None:
    data, n_px = run.data, run.model.n_px
    if not run.run.validate_every:
        raise SettingError("--run.validate-every is not set, but early stopping needs evaluations on held-out images")
    if run.run.validate_every > run.optim.steps:
        raise SettingError(
            f"--run.validate-every {run.run.validate_every} is more than --optim.steps {run.optim.steps}: training ends"
            " before the first evaluation"
        )
    if not data.val_split or set(data.val_split.split("+")) & set(data.split.split("+")):
        raise SettingError(
            f"--val-split {data.val_split!r} with --split {data.split!r}: early stopping needs images that are not"
            " trained on; prepare the store with --holdout 0.1, for example, and leave both settings at their defaults"
        )
    if run.tune.pad >= n_px:
        raise SettingError(f"--tune.pad is {run.tune.pad}, expected at most {n_px - 1} for images of {n_px} pixels")


def _check_labels(store: TokenStore, settings: FinetuneConfig) -> None:
    """Raise `TokenStoreError` if an image has no label, or all training images have the same. Reads shard by shard."""
    counts = np.zeros(len(store.manifest.classes), np.int64)
    for table in store.read_split(settings.split):
        counts += np.bincount(labels_in(table, settings.split), minlength=len(counts))
    for table in store.read_split(settings.val_split):
        labels_in(table, settings.val_split)
    if (counts > 0).sum() < 2:
        raise TokenStoreError(
            f"all images of {settings.split} are of one class, expected two or more: for images in folders, use one"
            " folder per class"
        )
