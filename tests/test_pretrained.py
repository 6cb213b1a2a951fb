"""The Python interface: images of every form, and the same numbers as the functions of the sub-packages."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model
from PIL import Image

import igpt_ray
from igpt_ray import weights
from igpt_ray.data import pixels
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat
from igpt_ray.errors import CheckpointError, ImageError, SettingError
from igpt_ray.evaluate import features
from igpt_ray.evaluate.likelihood import class_logits, image_nats


def release_at(uri: str, palette: Palette, kind: TokenFormat, **shape: Any) -> str:
    model = random_model(**shape)
    config = weights.ReleaseConfig(
        format=weights.FORMAT, model=model.config, kind=kind, sha256="", classes=["cat", "dog"], trained={}
    )
    weights.save_release(uri, model.state_dict(), palette, config)
    return uri


@pytest.fixture
def loaded(tmp_path: Path, palette: Palette, kind: TokenFormat) -> igpt_ray.Pretrained:
    return igpt_ray.load(release_at(str(tmp_path / "release"), palette, kind))


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (9, 12, 3), np.uint8))


def test_an_image_is_the_same_tokens_in_every_form(
    loaded: igpt_ray.Pretrained, picture: Image.Image, tmp_path: Path
) -> None:
    """An array that is taken for encoded bytes, channels in another order, a view other than the release's."""
    data = pixels.png(np.asarray(picture))
    (tmp_path / "picture.png").write_bytes(data)
    forms = [picture, np.asarray(picture), data, tmp_path / "picture.png", str(tmp_path / "picture.png")]
    tokens = loaded.tokens(forms)
    kind = loaded.config.kind
    expected = loaded.palette.encode(pixels.centre_view(data, kind.n_px, kind.pipeline)).reshape(-1)
    assert (tokens == expected).all()
    with pytest.raises(ImageError, match=r"got float64 \(2, 2\): expected a PIL image"):
        loaded.tokens(np.zeros((2, 2)))  # type: ignore[arg-type]


def test_a_release_of_the_direct_view_reads_images_with_it(
    palette: Palette, kind: TokenFormat, picture: Image.Image, tmp_path: Path
) -> None:
    """The caller does not name the view."""
    direct = kind.model_copy(update={"pipeline": "fast-direct-1"})
    loaded = igpt_ray.load(release_at(str(tmp_path / "release"), palette, direct))
    square = picture.crop((1, 0, 10, 9)).resize((4, 4), Image.Resampling.BOX)
    assert (loaded.tokens(picture)[0] == palette.encode(np.asarray(square)).reshape(-1)).all()


def test_completions_keep_what_is_given_and_depend_on_the_seed_alone(
    loaded: igpt_ray.Pretrained, picture: Image.Image
) -> None:
    original = np.asarray(loaded.image(loaded.tokens(picture)[0]))
    first, second = (loaded.complete(picture, n=3, seed=5) for _ in range(2))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]
    assert first[0].size == (loaded.n_px, loaded.n_px)
    assert all((np.asarray(image)[:2] == original[:2]).all() for image in first)
    assert len({image.tobytes() for image in first}) > 1
    assert loaded.complete(picture, n=1, seed=6)[0].tobytes() == first[1].tobytes()
    mask = np.zeros((4, 4), bool)
    mask[:, 1] = True
    for image in loaded.complete(picture, mask=mask):
        assert (np.asarray(image)[:, 1] == original[:, 1]).all()
    assert loaded.complete(picture, n=1, rows=4)[0].tobytes() == original.tobytes()


def test_what_cannot_be_completed_is_refused(loaded: igpt_ray.Pretrained, picture: Image.Image) -> None:
    with pytest.raises(SettingError, match="rows is 5: expected 0 to 4"):
        loaded.complete(picture, rows=5)
    with pytest.raises(SettingError, match=r"expected \(4, 4\), True in the prompt"):
        loaded.complete(picture, mask=np.ones((2, 2), bool))
    with pytest.raises(SettingError, match="rows or mask"):
        loaded.complete(picture, rows=1, mask=np.ones((4, 4), bool))
    with pytest.raises(CheckpointError, match="no class head"):
        loaded.classify(picture)


def test_scores_and_features_are_those_of_evaluation(loaded: igpt_ray.Pretrained, picture: Image.Image) -> None:
    tokens = loaded.tokens([picture, picture.rotate(180)])
    assert np.array_equal(loaded.score([picture, picture.rotate(180)]), image_nats(loaded.model, tokens, 2))
    found = loaded.features([picture, picture.rotate(180)], layer=2)
    assert found.shape == (2, 32)
    assert np.allclose(found, features.pooled(loaded.model, tokens, ["0", "1"], [2], "mean", 2)[:, 0], atol=1e-6)
    with pytest.raises(SettingError, match="no layer 9"):
        loaded.features(picture, layer=9)


def test_a_fine_tuned_release_names_classes(
    tmp_path: Path, palette: Palette, kind: TokenFormat, picture: Image.Image
) -> None:
    model = igpt_ray.load(release_at(str(tmp_path / "tuned"), palette, kind, n_class=2))
    found = model.classify(picture)
    logits = torch.from_numpy(class_logits(model.model, model.tokens(picture), ["0"], 1))
    assert found == pytest.approx(dict(zip(["cat", "dog"], logits.softmax(1)[0].tolist(), strict=True)), rel=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_package_is_imported_without_torch_and_ray() -> None:
    code = (
        "import sys, igpt_ray; print(igpt_ray.__version__, [m for m in ('torch', 'ray', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{igpt_ray.__version__} []"
