"""Images that are small by nature: used as they are, resized once, and shifted instead of cropped."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from igpt_ray import artifact, storage
from igpt_ray.data import palette_fit, pixels, prepare, verify
from igpt_ray.data.augment import shifted
from igpt_ray.data.config import PaletteConfig, PixelsConfig, PrepareConfig, VerifyConfig
from igpt_ray.data.image_files import RGB, decode
from igpt_ray.data.mapper import serial_map
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import PaletteError

DIRECT = ["fast-direct-1", "reference-direct-1"]
CURRENT = [pixels.FAST, pixels.REFERENCE, *DIRECT]
OLD = ["fast-1", "reference-1"]


def noise(height: int, width: int, seed: int = 0) -> RGB:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("pipeline", CURRENT)
@pytest.mark.parametrize("n_px", [1, 8, 32, 64, 224])
def test_an_image_of_n_px_is_its_own_centre_view(n_px: int, pipeline: str) -> None:
    """Enlarged to 224 and reduced again, an image of 32 x 32 is blurred."""
    rgb = noise(n_px, n_px)
    np.testing.assert_array_equal(pixels.centre_view(pixels.png(rgb), n_px, pipeline), rgb)


@pytest.mark.parametrize("pipeline", CURRENT)
def test_a_jpeg_of_n_px_is_only_decoded(smooth: RGB, pipeline: str, tmp_path: Path) -> None:
    Image.fromarray(smooth[:32, :32]).save(tmp_path / "a.jpg", quality=80)
    data = (tmp_path / "a.jpg").read_bytes()
    np.testing.assert_array_equal(pixels.centre_view(data, 32, pipeline), decode(data))


@pytest.mark.parametrize("pipeline", CURRENT)
def test_tokens_survive_a_png_file(pipeline: str) -> None:
    """A completion that is saved and read again is the same completion."""
    palette = Palette.load("openai")
    tokens = np.random.default_rng(1).integers(0, 512, (32, 32)).astype(np.uint16)
    read = palette.encode(pixels.centre_view(pixels.png(palette.decode(tokens)), 32, pipeline))
    np.testing.assert_array_equal(read, tokens)


@pytest.mark.parametrize("pipeline", OLD)
def test_an_older_pipeline_still_resizes_such_an_image(pipeline: str) -> None:
    """A release that was trained on those views gets no others."""
    rgb = noise(32, 32) // 2 + 64  # PIL clips between its passes, which fast does not
    box = Image.fromarray(rgb).resize((224, 224), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BOX)
    assert (np.asarray(box) != rgb).mean() > 0.5
    assert np.abs(pixels.centre_view(pixels.png(rgb), 32, pipeline).astype(int) - np.asarray(box)).max() <= 2


@pytest.mark.parametrize("pipeline", DIRECT)
@pytest.mark.parametrize("shape", [(96, 96), (96, 97), (131, 96), (500, 375), (20, 41)])
def test_the_direct_view_is_one_box_filter_of_the_centre_square(shape: tuple[int, int], pipeline: str) -> None:
    rgb = noise(*shape)
    view = pixels.centre_view(pixels.png(rgb), 32, pipeline)
    side = min(shape)
    top, left = ((length - side) // 2 for length in shape)
    square = rgb[top : top + side, left : left + side]
    np.testing.assert_array_equal(view, ImageOps.fit(Image.fromarray(square), (32, 32), Image.Resampling.BOX))
    if side == 96:
        assert np.abs(view - square.reshape(32, 3, 32, 3, 3).mean((1, 3))).max() <= 1  # PIL's two passes round


@pytest.mark.parametrize("pipeline", DIRECT)
@pytest.mark.parametrize("shape", [(1, 60_000), (3, 1), (1, 1)])
def test_the_direct_view_takes_images_of_any_shape(shape: tuple[int, int], pipeline: str) -> None:
    """Nothing is resized to a shorter side of 224, so nothing is too narrow."""
    white = pixels.png(np.full((*shape, 3), 255, np.uint8))
    for view in (pixels.centre_view(white, 32, pipeline), pixels.random_view(white, 32, "key", 0, pipeline)):
        assert view.shape == (32, 32, 3)
        assert (view == 255).all()


@pytest.mark.parametrize(("pipeline", "side"), [*((name, 32) for name in CURRENT), *((name, 96) for name in DIRECT)])
def test_random_views_of_small_images_are_shifted_and_mirrored(pipeline: str, side: int) -> None:
    """As the paper augments CIFAR: up to 4 pixels each way with reflection, half of them mirrored, all alike often."""
    data = pixels.png(noise(side, side))
    centre = pixels.centre_view(data, 32, pipeline)
    packed = (centre.astype(np.int64) << (0, 8, 16)).sum(-1).reshape(1, -1)
    offsets = range(-4, 5)
    found = {}
    for mirrored in (False, True):
        for down in offsets:
            for right in offsets:
                place = np.array([down]), np.array([-right if mirrored else right]), np.array([mirrored])
                found[shifted(packed, 32, *place).tobytes()] = down, right, mirrored
    drawn = []
    for i in range(400):
        view = pixels.random_view(data, 32, f"{i}.png", 0, pipeline)
        drawn.append(found[(view.astype(np.int64) << (0, 8, 16)).sum(-1).tobytes()])
    downs, rights, mirrors = (np.array(draws) for draws in zip(*drawn, strict=True))
    assert set(downs) == set(rights) == set(offsets)
    assert 0.4 < mirrors.mean() < 0.6
    assert np.abs(np.corrcoef([downs, rights, mirrors])[np.triu_indices(3, 1)]).max() < 0.2


@pytest.mark.parametrize("pipeline", CURRENT)
def test_a_random_view_of_a_small_image_is_a_function_of_key_and_view(pipeline: str) -> None:
    data = pixels.png(noise(32, 32))

    def views(key: str) -> list[bytes]:
        return [pixels.random_view(data, 32, key, view, pipeline).tobytes() for view in range(10)]

    assert views("a") == views("a")
    assert len(set(views("a"))) > 5
    assert views("a") != views("b")


@pytest.mark.parametrize("n_px", [1, 4, 8, 64])
def test_the_shift_is_an_eighth_of_the_side(n_px: int) -> None:
    """Below 8 pixels a side, images are only mirrored."""
    rgb = np.broadcast_to(np.arange(n_px, dtype=np.uint8)[:, None, None], (n_px, n_px, 3)).copy()
    shifts = set()
    for i in range(200):
        column = pixels.random_view(pixels.png(rgb), n_px, str(i), 0, DIRECT[0])[:, 0, 0].astype(int)
        shifts.add(int(column[n_px // 2]) - n_px // 2)
    assert shifts == set(range(-(n_px // 8), n_px // 8 + 1))


# ------------------------------------------------------------------------------------------------ stores


@pytest.fixture
def source(tmp_path: Path) -> str:
    """12 images of 16 x 16 in class folders, train and test."""
    for i in range(12):
        split = "test" if i % 3 == 2 else "train"
        storage.write(f"{tmp_path}/images/{split}/{i % 2}/{i}.png", pixels.png(noise(16, 16, i)))
    return f"{tmp_path}/images"


def stored(source: str, root: Path, view: str, crop: str = "centre") -> PrepareConfig:
    """Settings of a store that has been prepared, with a palette of the same view."""
    settings = PixelsConfig.model_validate({"n_px": 16, "view": view, "crop": crop})
    palette = str(root / "palette.npy")
    palette_fit.fit_palette(PaletteConfig(source=source, out=palette, k=32, pixels=settings), serial_map)
    prepared = PrepareConfig(source=source, palette=palette, tokens=str(root / "tokens"), pixels=settings)
    prepare.prepare(prepared, serial_map)
    return prepared


def test_the_view_is_part_of_palette_and_store(source: str, tmp_path: Path) -> None:
    """Otherwise a palette and tokens of different views, or a release and tokens, are combined without an error."""
    direct = stored(source, tmp_path / "direct", "direct")
    assert json.loads(Path(direct.palette).with_suffix(".json").read_text())["pipeline"] == "fast-direct-1"
    store = TokenStore.open(direct.tokens)
    assert store.kind.pipeline == "fast-direct-1"
    for table in store.read_split("test"):
        for key, tokens in zip(table["key"].to_pylist(), table["tokens"].to_pylist(), strict=True):
            rgb = decode(storage.read(f"{source}/test/{key}"))
            assert (np.asarray(tokens).reshape(16, 16) == store.palette().encode(rgb)).all()
    with pytest.raises(PaletteError, match=r"'fast-direct-1', not 'fast-2': set .*view direct, or fit"):
        prepare.prepare(
            direct.model_copy(update={"tokens": str(tmp_path / "other"), "pixels": PixelsConfig(n_px=16)}), serial_map
        )


def test_an_older_store_is_verified_with_its_own_pipeline(source: str, tmp_path: Path) -> None:
    """Its settings name no view. Computed again with today's default, all of its tokens would seem wrong."""
    old = stored(source, tmp_path, "imagenet-1", "random")
    manifest = Path(old.tokens, "manifest.json")
    body = json.loads(artifact.unseal(manifest.read_bytes()) or b"")
    assert body["kind"]["pipeline"] == "fast-1"
    assert body["made_by"]["settings"]["pixels"].pop("view") == "imagenet-1"
    manifest.write_bytes(artifact.seal(json.dumps(body)))
    assert verify.verify(VerifyConfig(tokens=old.tokens, remake=2), serial_map)["remade"] == 2
    shutil.rmtree(manifest.parent)
    prepare.prepare(old, serial_map)  # the old pipeline can still be selected, for test sets of old releases
    assert TokenStore.open(old.tokens).kind.pipeline == "fast-1"
