"""Other people's pictures: CIFAR-10 files as a class folder go the whole way without a change of code."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt_ray.data.config import PaletteConfig, PixelsConfig, PrepareConfig
from igpt_ray.flows import batch, prepare, train
from igpt_ray.generate.config import CompleteConfig
from igpt_ray.model.config import ModelConfig
from igpt_ray.train import metrics
from igpt_ray.train.config import DataConfig, OptimConfig, RunConfig, WorkersConfig
from igpt_ray.train.presets import PRESETS

pytestmark = pytest.mark.ray
N_IMAGES = 300


@pytest.fixture
def cifar(shared: Path, tmp_path: Path) -> str:
    """`<class>/<number>.jpg`, the same number of each of ten classes."""
    with tarfile.open(shared / "data/cifar10_sample.tar") as tar:
        members = [m for m in tar.getmembers() if "/train/" in m.name and m.name.endswith(".jpg")]
        per_class: dict[str, int] = {}
        for member in members:
            label = member.name.split("/")[-2]
            per_class[label] = per_class.get(label, 0) + 1
            if per_class[label] <= N_IMAGES // 10:
                member.name = f"{label}/{Path(member.name).name}"
                tar.extract(member, tmp_path / "cifar", filter="data")
    return str(tmp_path / "cifar")


def test_cifar_images_go_through_every_stage_up_to_completions(cluster: str, cifar: str, tmp_path: Path) -> None:
    pixels = PixelsConfig(n_px=16)
    palette, tokens = str(tmp_path / "palette.npy"), str(tmp_path / "tokens")
    fitted = prepare.fit_palette(PaletteConfig(source=cifar, out=palette, k=128, pixels=pixels))
    assert fitted["images"] == N_IMAGES
    assert fitted["psnr_db"] > 25
    stored = prepare.prepare(PrepareConfig(source=cifar, palette=palette, tokens=tokens, pixels=pixels))
    assert stored["splits"] == {"train": N_IMAGES}
    assert stored["classes"] == 10
    tiny = PRESETS["tiny"][1]
    trained = train.pretrain(
        tiny.model_copy(
            update={
                "model": ModelConfig(n_layer=2, n_embd=64, n_head=2, n_px=16, n_vocab=128),
                "optim": OptimConfig(batch_size=16, steps=20, warmup_steps=5),
                "data": DataConfig(tokens=tokens),
                "workers": WorkersConfig(n=2),
                "run": RunConfig(root=str(tmp_path / "runs"), checkpoint_every=10),
            }
        )
    )
    losses = [line["nats_per_token"] for line in metrics.read(trained.run)]
    assert np.log(128) > losses[0] > losses[-1]
    done = batch.complete(
        CompleteConfig(release=trained.release, tokens=tokens, out=str(tmp_path), split="train", images=4, n=2)
    )
    figure = np.asarray(Image.open(done["figure"]))
    assert figure.shape == (4 * (6 * 16 + 2) + 2, 4 * (6 * 16 + 2) + 2 + 2 * 8, 3)
