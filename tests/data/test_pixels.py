"""Views: the paper's crops, and the fast pipeline, which is reproducible and close to the reference."""

import hashlib
import os
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from image_cases import encoded

from igpt_ray.data import image_files, pixels
from igpt_ray.data.palette import Palette
from igpt_ray.data.pixels import FAST, REFERENCE, RGB
from igpt_ray.errors import ImageError

# ------------------------------------------------------------------------------------------------ views


@pytest.mark.parametrize("pipeline", [FAST, REFERENCE])
@pytest.mark.parametrize("height_first", [True, False])
def test_the_centre_view_is_the_mean_over_boxes_of_the_middle(height_first: bool, pipeline: str) -> None:
    """Without enlargement the result can be computed by hand: 224 / 32 = 7 pixels per box."""
    rgb = np.random.default_rng(1).integers(0, 256, (224, 300, 3), dtype=np.uint8)
    middle = rgb[:, 38 : 38 + 224]
    if not height_first:
        rgb, middle = rgb.transpose(1, 0, 2).copy(), middle.transpose(1, 0, 2)
    boxes = middle.reshape(32, 7, 32, 7, 3).mean((1, 3))
    assert np.abs(pixels.centre_view(pixels.png(rgb), 32, pipeline) - boxes).max() <= 1  # PIL's two passes round


@pytest.mark.parametrize("pipeline", [FAST, REFERENCE])
@pytest.mark.parametrize("n_px", [1, 8, 32, 48, 64, 224])
@pytest.mark.parametrize("shape", [(100, 50), (50, 100), (224, 224), (1000, 300), (1, 1), (3, 500), (1025, 1023)])
def test_views_have_the_same_size_for_images_of_any_size(shape: tuple[int, int], n_px: int, pipeline: str) -> None:
    """If the shorter side were rounded to 223, there would be a black edge or an error. Weights must sum to one."""
    white = simplejpeg.encode_jpeg(np.full((*shape, 3), 255, np.uint8))
    for view in (
        pixels.centre_view(white, n_px, pipeline),
        pixels.random_view(white, n_px, "key", 0, pipeline),
    ):
        assert view.shape == (n_px, n_px, 3)
        assert (view == 255).all()


@pytest.mark.parametrize("pipeline", [FAST, REFERENCE])
def test_random_views_are_the_paper_s_random_crops(pipeline: str) -> None:
    """Size, position and aspect ratio are correct; the colours of the test image encode the position of each pixel."""
    y, x = np.mgrid[0:512, 0:512] / 511 * 255
    position = pixels.png(np.stack([x, y, x], -1).astype(np.uint8))
    drawn = [pixels.random_view(position, 32, f"{i}.png", 0, pipeline) for i in range(80)]
    views = np.stack(drawn).astype(float) / 255
    widths = (views[:, 0, -1, 0] - views[:, 0, 0, 0]) * 32 / 31  # share of the shorter side
    heights = (views[:, -1, 0, 1] - views[:, 0, 0, 1]) * 32 / 31
    np.testing.assert_allclose(widths, heights, atol=0.02)
    assert 224 / 384 - 0.02 < widths.min() < 0.63
    assert 0.82 < widths.max() < 224 / 256 + 0.02
    lefts = views[:, 0, 0, 0] - widths / 64
    assert lefts.min() > -0.02
    assert (lefts + widths).max() < 1.02
    assert lefts.min() < 0.05
    assert (lefts + widths).max() > 0.95
    assert abs(np.corrcoef(views[:, 0, 0, 0], views[:, 0, 0, 1])[0, 1]) < 0.9  # left and top are drawn apart


@pytest.mark.parametrize("pipeline", [FAST, REFERENCE])
def test_a_random_view_is_a_function_of_key_and_view(smooth: RGB, pipeline: str) -> None:
    """A generator shared by images would give a repeated task other bytes."""
    data = encoded(smooth, "JPEG")
    first = pixels.random_view(data, 32, "a/b.jpg", 0, pipeline)
    np.testing.assert_array_equal(pixels.random_view(data, 32, "a/b.jpg", 0, pipeline), first)
    assert (pixels.random_view(data, 32, "a/b.jpg", 1, pipeline) != first).any()
    assert (pixels.random_view(data, 32, "a/c.jpg", 0, pipeline) != first).any()


def test_the_pixels_of_a_named_pipeline_do_not_change(smooth: RGB) -> None:
    """A change of decoder, filter or crop that changes pixels needs a new version, which stores and releases record."""
    jpeg = simplejpeg.encode_jpeg(smooth.repeat(2, 0).repeat(2, 1), 90)
    made = {}
    for pipeline in pixels.PIPELINES:
        views = [pixels.centre_view(jpeg, 32, pipeline), pixels.random_view(jpeg, 32, "a/b.jpg", 3, pipeline)]
        views += [pixels.centre_view(pixels.png(smooth), 32, pipeline)]
        views += [pixels.random_view(pixels.png(smooth[:32, :32]), 32, "a/b.jpg", 3, pipeline)]
        made[pipeline] = [hashlib.sha256(view.tobytes()).hexdigest()[:8] for view in views]
    assert made == {
        "fast-1": ["319592d3", "1cdd1048", "c7ed8a6c", "8f74c2eb"],
        "fast-2": ["319592d3", "1cdd1048", "c7ed8a6c", "b3787deb"],
        "fast-direct-1": ["97c794a2", "bc901a3b", "c6d0bc4b", "b3787deb"],
        "reference-1": ["78575605", "71cca430", "3992cfa1", "1ab297ad"],
        "reference-2": ["78575605", "71cca430", "3992cfa1", "b3787deb"],
        "reference-direct-1": ["97c794a2", "bc901a3b", "c6d0bc4b", "b3787deb"],
    }


@pytest.mark.parametrize(("width", "height"), [(3000, 2), (2, 3000), (60_000, 1), (1, 50_000), (3000, 3), (5000, 7)])
def test_views_of_very_narrow_images_are_the_same_in_both_pipelines(width: int, height: int) -> None:
    """1 x 60,000 pixels are three billion after the shorter side is resized to 224: only the crop is computed."""
    steps = np.random.default_rng(1).normal(0, 0.3, (height, width, 3)).cumsum(int(width > height))
    data = pixels.png((128 + 80 * np.sin(steps)).astype(np.uint8))  # far from 0 and 255, where PIL clips twice
    for view in (pixels.centre_view, partial(pixels.random_view, key="key", view=1)):
        fast, reference = (view(data, 32, pipeline=pipeline).astype(int) for pipeline in (FAST, REFERENCE))
        assert np.abs(fast - reference).max() <= 1


def test_large_images_are_folded_in_parts_with_the_same_result(smooth: RGB, monkeypatch: pytest.MonkeyPatch) -> None:
    """The floats of a whole image of 67 megapixels would take 800 MB."""
    whole = pixels.centre_view(pixels.png(smooth), 8)
    monkeypatch.setattr(pixels, "FOLDED_PIXELS", 999)
    np.testing.assert_array_equal(pixels.centre_view(pixels.png(smooth), 8), whole)


def test_the_error_of_an_unknown_pipeline_lists_the_known_ones(smooth: RGB) -> None:
    """A store of a later version must not be used with other pixels."""
    with pytest.raises(ImageError, match=r"'fast-3'.*fast-2, .*reference-2"):
        pixels.centre_view(pixels.png(smooth), 32, "fast-3")


# ------------------------------------------------------------------------------------------------ fast


@pytest.fixture(scope="module")
def photographs(shared: Path) -> dict[str, bytes]:
    """100 files of ImageNet: 80 of the training tar of tars, 20 of the flat validation tar."""
    found = {}
    with tarfile.open(shared / "data" / "imagenet_sample" / "ILSVRC2012_img_train.tar") as outer:
        for synset in outer:
            with tarfile.open(fileobj=outer.extractfile(synset)) as inner:
                found |= {member.name: inner.extractfile(member).read() for member in inner}
    with tarfile.open(shared / "data" / "imagenet_sample" / "ILSVRC2012_img_val.tar") as flat:
        found |= {member.name: flat.extractfile(member).read() for member in flat}
    assert len(found) == 100
    return found


def test_fast_gives_almost_the_tokens_of_the_reference(photographs: dict[str, bytes], shared: Path) -> None:
    """Another filter, a shift of half a pixel or a missing normalisation cost 4 to 20 dB. Required: 50 dB and 94 %."""
    openai = Palette.load(str(shared / "data" / "openai_palette.npy"))
    fast = np.stack([pixels.centre_view(data, 32, FAST) for data in photographs.values()])
    reference = np.stack([pixels.centre_view(data, 32, REFERENCE) for data in photographs.values()])
    assert np.mean(psnr(fast, reference)) >= 53
    assert np.mean(openai.encode(fast) == openai.encode(reference)) >= 0.94


def test_fast_draws_the_crops_of_the_reference(photographs: dict[str, bytes]) -> None:
    """The crop inside the resize matrices is at the same pixel, and drawn in the same order."""
    some = list(photographs.items())[::4]
    fast = np.stack([pixels.random_view(data, 32, key, 1, FAST) for key, data in some])
    reference = np.stack([pixels.random_view(data, 32, key, 1, REFERENCE) for key, data in some])
    assert np.mean(psnr(fast, reference)) >= 53


@pytest.mark.parametrize("n_px", [3, 32, 48, 64, 100, 224])
@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (97, 61), (224, 224), (900, 700)])
def test_without_a_reduced_decode_fast_differs_only_by_rounding(shape: tuple[int, int], n_px: int) -> None:
    """The matrices equal PIL's two resizes, up and down, for boxes that divide 224 and others.

    The images have low contrast, so that PIL clips nothing between its passes. PIL rounds halves up between them, which
    raises means of two pixels.
    """
    data = pixels.png(np.random.default_rng(2).integers(64, 192, (*shape, 3)).astype(np.uint8))
    fast, reference = (pixels.centre_view(data, n_px, pipeline).astype(int) for pipeline in (FAST, REFERENCE))
    assert np.abs(fast - reference).max() <= 2
    assert np.abs(fast - reference).mean() <= 0.5


def test_real_photographs_are_decoded_alike_by_both_decoders(photographs: dict[str, bytes]) -> None:
    """simplejpeg and Pillow each contain a libjpeg-turbo; other defaults in one of them would change every pixel."""
    for data in list(photographs.values())[::5]:
        np.testing.assert_array_equal(simplejpeg.decode_jpeg(data), image_files.decode(data))


def psnr(a: RGB, b: RGB) -> np.ndarray:
    """PSNR in dB of each image of two stacks."""
    return 10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean((1, 2, 3)).clip(1e-9))


# ------------------------------------------------------------------------------------------------ bits


@pytest.mark.parametrize("eighths", [1, 2, 4, 8])
@pytest.mark.parametrize("n_px", [1, 7, 32, 48, 224])
def test_no_sum_of_products_can_leave_the_integers_of_its_float(n_px: int, eighths: int) -> None:
    """Therefore the order of additions, and with it BLAS, threads and processors, cannot change a bit."""
    for n_in in (40, 97, 224, 375, 500, 2047):
        _, length = pixels._resized(500, n_in, 224)
        place = (n_in, length, (length - 224) // 2, eighths, n_px)
        rows, columns = (pixels._side_of(*place, bits) for bits in (pixels.ROW_BITS, pixels.COLUMN_BITS))
        by_row, by_column = (
            max(np.abs(band.matrix).astype(np.float64).sum(1).max() for band in side) for side in (rows, columns)
        )
        assert 255 * by_row <= 2**24
        assert 255 * by_row * by_column <= 2**53
        for band in (*rows, *columns):
            assert (band.matrix == np.rint(band.matrix)).all()


DIGEST = """
import hashlib, sys, tarfile
from igpt_ray.data import pixels
digest = hashlib.sha256()
with tarfile.open(sys.argv[1]) as tar:
    for member in list(tar)[:6]:
        data = tar.extractfile(member).read()
        digest.update(pixels.centre_view(data, 32).tobytes() + pixels.random_view(data, 48, member.name, 2).tobytes())
print(digest.hexdigest())
"""


def test_the_bytes_do_not_depend_on_process_or_number_of_threads(shared: Path) -> None:
    """float32 products summed in another order could differ in the last bit, and then in a token."""
    files = str(shared / "data" / "imagenet_sample" / "ILSVRC2012_img_val.tar")
    running = []
    for run in range(8):
        environment = {"OPENBLAS_NUM_THREADS": str(1 + run % 2), "OMP_NUM_THREADS": str(1 + run % 2)}
        if run < 4:
            environment["OPENBLAS_CORETYPE"] = ("Haswell", "Nehalem")[run // 2]  # the kernels of other processors
        command = [sys.executable, "-c", DIGEST, files]
        running.append(subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True))
    digests = {process.communicate()[0] for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(digests) == 1


# ------------------------------------------------------------------------------------------------ sheets


def test_a_sheet_has_every_image_at_its_position() -> None:
    """Rows and columns are not swapped, and the enlargement does not smooth."""
    rng = np.random.default_rng(3)
    tiles = rng.integers(0, 255, (2, 3, 4, 4, 3), dtype=np.uint8)
    sheet = pixels.sheet([list(row) for row in tiles], scale=2, gap=2, wide_gaps=(2,))
    lefts, tops = [2, 12, 12 + 10 + 8], [2, 12]
    assert sheet.shape == (2 * 10 + 2, 30 + 8 + 2, 3)
    covered = np.zeros(sheet.shape[:2], bool)
    for r, top in enumerate(tops):
        for c, left in enumerate(lefts):
            np.testing.assert_array_equal(sheet[top : top + 8 : 2, left : left + 8 : 2], tiles[r, c])
            np.testing.assert_array_equal(sheet[top + 1 : top + 8 : 2, left + 1 : left + 8 : 2], tiles[r, c])
            covered[top : top + 8, left : left + 8] = True
    assert (sheet[~covered] == 255).all()
