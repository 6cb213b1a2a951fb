"""Pictures: every format becomes the same RGB, views are the paper's, and hostile bytes are refused by name."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from igpt_ray import images
from igpt_ray.errors import ImageError
from igpt_ray.images import RGB


@pytest.fixture(scope="module")
def smooth() -> RGB:
    """A picture that lossy formats keep well: (240, 320, 3)."""
    y, x = np.mgrid[0:240, 0:320]
    return np.stack([x * 255 // 319, y * 255 // 239, abs((x + y) % 256 - 128)], -1).astype(np.uint8)


def encoded(rgb: RGB, kind: str, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgb).convert(mode).save(out, kind, **options)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_give_back_every_pixel(smooth: RGB, kind: str, options: dict[str, object]) -> None:
    """Channels in another order, or rows upside down."""
    np.testing.assert_array_equal(images.decode(encoded(smooth, kind, **options)), smooth)
    np.testing.assert_array_equal(images.decode(images.png(smooth)), smooth)


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("PNG", "RGBA"), ("PNG", "P")]
)
def test_every_colour_model_becomes_rgb(smooth: RGB, kind: str, mode: str) -> None:
    """ImageNet has CMYK JPEGs; taken for RGB they are negatives."""
    expected = np.asarray(Image.fromarray(smooth).convert(mode).convert("RGB"))
    decoded = images.decode(encoded(smooth, kind, mode))
    assert decoded.shape == smooth.shape
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - expected).mean() < (1e-9 if kind == "PNG" else 4)


def test_grey_becomes_three_equal_channels(smooth: RGB) -> None:
    """(H, W) arrays would fail late, in the palette; 16-bit greys are clipped to white by a plain convert."""
    grey = smooth[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(images.decode(encoded(smooth[..., :1].repeat(3, 2), "PNG", "L")), expected)
    deep = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 257).save(deep, "PNG")
    np.testing.assert_array_equal(images.decode(deep.getvalue()), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_matter(smooth: RGB) -> None:
    """Some of ImageNet's are broken; the pixels are fine. Its orientation is not applied, as OpenAI did not."""
    plain = encoded(smooth, "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = encoded(smooth, "JPEG", quality=95, exif=exif)
    broken = encoded(smooth, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20))
    for data in (turned, broken):
        np.testing.assert_array_equal(images.decode(data), images.decode(plain))


def a_png_that_claims(width: int, height: int) -> bytes:
    """A few dozen bytes whose header announces a picture of any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JPEG, PNG, WEBP"),
        (b"<html>404</html>", "not a JPEG, PNG, WEBP"),
        (bytes(10_000), "not a JPEG, PNG, WEBP"),
        (encoded(np.zeros((8, 8, 3), np.uint8), "GIF"), "not a JPEG, PNG, WEBP"),
        (encoded(np.zeros((8, 8, 3), np.uint8), "BMP"), "not a JPEG, PNG, WEBP"),
        (a_png_that_claims(9000, 9000), "more than the limit"),
        (a_png_that_claims(2_000_000, 2_000_000), "exceeds limit"),
    ],
    ids=["empty", "html", "zeros", "gif", "bmp", "large", "bomb"],
)
def test_what_is_not_a_picture_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    """A decoder's own exception would end the job; an announced size must be refused before memory is taken."""
    with pytest.raises(ImageError, match=reason):
        images.decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_or_flipped_picture_is_an_image_error_or_a_picture(smooth: RGB, kind: str) -> None:
    """Decoders raise SyntaxError, struct.error, OSError ...: one that slips through ends a job over one bad file."""
    data = encoded(smooth[:64, :64], kind)
    with pytest.raises(ImageError):
        images.decode(data[: len(data) // 2])
    rng = np.random.default_rng(0)
    for _ in range(200):
        flipped = bytearray(data)
        for position in rng.integers(0, len(data), 3):
            flipped[position] ^= int(rng.integers(1, 256))
        try:
            assert images.decode(bytes(flipped)).ndim == 3
        except ImageError:
            continue


# ------------------------------------------------------------------------------------------------ views


@pytest.mark.parametrize("height_first", [True, False])
def test_the_centre_view_is_the_mean_over_boxes_of_the_middle(height_first: bool) -> None:
    """Where nothing has to be enlarged it can be computed by hand: 224 / 32 = 7 pixels a box."""
    rgb = np.random.default_rng(1).integers(0, 256, (224, 300, 3), dtype=np.uint8)
    middle = rgb[:, 38 : 38 + 224]
    if not height_first:
        rgb, middle = rgb.transpose(1, 0, 2).copy(), middle.transpose(1, 0, 2)
    boxes = middle.reshape(32, 7, 32, 7, 3).mean((1, 3))
    assert np.abs(images.centre_view(rgb, 32) - boxes).max() <= 1  # the two passes of the filter round


@pytest.mark.parametrize("n_px", [8, 32, 48, 64])
@pytest.mark.parametrize("shape", [(100, 50), (50, 100), (224, 224), (1000, 300), (1, 1), (3, 500)])
def test_every_view_has_its_size_whatever_the_picture_had(shape: tuple[int, int], n_px: int) -> None:
    """Rounding that makes the shorter side 223 leaves a black edge, or fails."""
    white = np.full((*shape, 3), 255, np.uint8)
    for view in (images.centre_view(white, n_px), images.random_view(white, n_px, "key", 0)):
        assert view.shape == (n_px, n_px, 3)
        assert (view == 255).all()


def test_random_views_are_crops_as_the_paper_draws_them() -> None:
    """A crop of the wrong size, always in a corner, or squashed. The picture's colours tell where each pixel was."""
    y, x = np.mgrid[0:512, 0:512] / 511 * 255
    position = np.stack([x, y, x], -1).astype(np.uint8)
    views = np.stack([images.random_view(position, 32, f"{i}.png", 0) for i in range(80)]).astype(float) / 255
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


def test_a_random_view_is_a_function_of_key_and_view(smooth: RGB) -> None:
    """A generator shared over images: a repeated task would write other bytes than the first."""
    first = images.random_view(smooth, 32, "a/b.jpg", 0)
    np.testing.assert_array_equal(images.random_view(smooth, 32, "a/b.jpg", 0), first)
    assert (images.random_view(smooth, 32, "a/b.jpg", 1) != first).any()
    assert (images.random_view(smooth, 32, "a/c.jpg", 0) != first).any()


def test_the_pipeline_that_bears_this_name_makes_these_pixels(smooth: RGB) -> None:
    """A change of filter, crop or Pillow that moves pixels needs a new `PIPELINE`: stores and releases trust it."""
    views = [images.centre_view(smooth, 32), images.random_view(smooth, 32, "a/b.jpg", 3)]
    digests = {images.PIPELINE: [hashlib.sha256(view.tobytes()).hexdigest()[:16] for view in views]}
    assert digests == {"reference-1": ["3992cfa14ba050ad", "39f3f3ad64617918"]}


def test_a_picture_too_narrow_to_resize_is_refused() -> None:
    """One pixel by 300,000 is a small file, and fifteen billion pixels once its shorter side is 224."""
    with pytest.raises(ImageError, match="too narrow"):
        images.centre_view(np.zeros((1, 300_000, 3), np.uint8), 32)


# ------------------------------------------------------------------------------------------------ sheets


def test_a_sheet_holds_every_picture_at_its_place() -> None:
    """Rows for columns, or an enlargement that smooths."""
    rng = np.random.default_rng(3)
    tiles = rng.integers(0, 255, (2, 3, 4, 4, 3), dtype=np.uint8)
    sheet = images.sheet([list(row) for row in tiles], scale=2, gap=2, wide_gaps=(2,))
    lefts, tops = [2, 12, 12 + 10 + 8], [2, 12]
    assert sheet.shape == (2 * 10 + 2, 30 + 8 + 2, 3)
    covered = np.zeros(sheet.shape[:2], bool)
    for r, top in enumerate(tops):
        for c, left in enumerate(lefts):
            np.testing.assert_array_equal(sheet[top : top + 8 : 2, left : left + 8 : 2], tiles[r, c])
            np.testing.assert_array_equal(sheet[top + 1 : top + 8 : 2, left + 1 : left + 8 : 2], tiles[r, c])
            covered[top : top + 8, left : left + 8] = True
    assert (sheet[~covered] == 255).all()
