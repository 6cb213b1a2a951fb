"""Decoding: every format gives the same RGB; malicious, truncated or damaged files are errors with a reason."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_cases import SAMPLINGS, chunk, encoded, jpeg_of, png_of
from PIL import Image

from igpt_ray.data import image_files, jpeg_segments, pixels, png_chunks
from igpt_ray.data.image_files import RGB
from igpt_ray.errors import ImageError

# ------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_decode_to_the_original_pixels(smooth: RGB, kind: str, options: dict[str, object]) -> None:
    """The order of channels and rows is correct."""
    np.testing.assert_array_equal(image_files.decode(encoded(smooth, kind, **options)), smooth)
    np.testing.assert_array_equal(image_files.decode(pixels.png(smooth)), smooth)


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("PNG", "RGBA"), ("PNG", "P")]
)
def test_every_colour_model_becomes_rgb(smooth: RGB, kind: str, mode: str) -> None:
    """ImageNet has CMYK JPEGs, which are negatives if read as RGB."""
    expected = np.asarray(Image.fromarray(smooth).convert(mode).convert("RGB"))
    decoded = image_files.decode(encoded(smooth, kind, mode))
    assert decoded.shape == smooth.shape
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - expected).mean() < (1e-9 if kind == "PNG" else 4)


def test_grey_becomes_three_equal_channels(smooth: RGB) -> None:
    """An (H, W) array would fail later, in the palette. Pillow's convert clips 16-bit greys to white."""
    grey = smooth[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(image_files.decode(encoded(smooth[..., :1].repeat(3, 2), "PNG", "L")), expected)
    deep = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 257).save(deep, "PNG")
    np.testing.assert_array_equal(image_files.decode(deep.getvalue()), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_matter(smooth: RGB) -> None:
    """Some of ImageNet's EXIF blocks are damaged. The orientation is not applied, as in OpenAI's data."""
    plain = encoded(smooth, "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    rotated = encoded(smooth, "JPEG", quality=95, exif=exif)
    broken = encoded(smooth, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20))
    for data in (rotated, broken):
        np.testing.assert_array_equal(image_files.decode(data), image_files.decode(plain))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not a JPEG, PNG, WEBP"),
        (bytes(10_000), "not a JPEG, PNG, WEBP"),
        (encoded(np.zeros((8, 8, 3), np.uint8), "GIF"), "not a JPEG, PNG, WEBP"),
        (encoded(np.zeros((8, 8, 3), np.uint8), "BMP"), "not a JPEG, PNG, WEBP"),
        (png_of(9000, 9000, bytes(100)), "more than the limit"),
        (png_of(2_000_000, 2_000_000, bytes(100)), "more than the limit"),
    ],
    ids=["empty", "html", "zeros", "gif", "bmp", "large", "bomb"],
)
def test_files_that_are_not_images_are_errors_with_a_reason(data: bytes, reason: str) -> None:
    """A decoder's own exception would end the job; an excessive size must be rejected before the allocation."""
    with pytest.raises(ImageError, match=reason):
        image_files.decode(data)


@pytest.mark.parametrize("side", [1, 3, 8, 17])
@pytest.mark.parametrize(
    ("depth", "colours"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (16, 2), (8, 4), (16, 4), (16, 6)]
)
def test_the_expected_bytes_of_a_png_follow_from_its_header(side: int, depth: int, colours: int) -> None:
    """A wrong count of bytes would reject valid files. All samples are one grey, so that the test knows the result."""
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colours]
    row = b"\0" + b"\xff" * -(-side * samples * depth // 8)
    assert (image_files.decode(png_of(side, side, row * side, depth, colours)) == 255).all()
    for wrong in (row * (side - 1), row * side + b"\0"):
        with pytest.raises(ImageError, match="bytes of rows"):
            image_files.decode(png_of(side, side, wrong, depth, colours))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 5), (4, 4), (5, 1), (9, 13), (31, 33)])
def test_interlaced_pngs_have_as_many_rows_as_pil_reads(width: int, height: int) -> None:
    """Interlacing has seven passes, some empty in small images. Too low a count would leave some pixels black."""
    for n_bytes in range(height * (1 + 3 * width), height * (9 + 3 * width)):
        data = bytearray(png_of(width, height, b"\0" * n_bytes))
        data[28] = 1
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        if n_bytes == _adam7_bytes(width, height):
            assert image_files.decode(bytes(data)).shape == (height, width, 3)
        else:
            with pytest.raises(ImageError, match="bytes of rows"):
                image_files.decode(bytes(data))


def _adam7_bytes(width: int, height: int) -> int:
    """Bytes of an interlaced PNG, from a count of each pixel of the pattern in the standard."""
    pattern = ["16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777"]
    passes = [[pattern[y % 8][x % 8] for x in range(width)] for y in range(height)]
    return sum(1 + 3 * row.count(n) for n in "1234567" for row in passes if n in row)


def test_transparency_is_laid_on_white(smooth: RGB) -> None:
    """Without the alpha channel, hidden pixels would appear: often black, sometimes noise."""
    alpha = np.zeros((240, 320, 1), np.uint8)
    alpha[:, 160:] = 255
    alpha[:, 80:160] = 128
    rgba = np.concatenate([smooth, alpha], 2)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        out = io.BytesIO()
        Image.fromarray(rgba).save(out, kind, **options)
        decoded = image_files.decode(out.getvalue())
        assert (decoded[:, :80] == 255).all()
        half = smooth[:, 80:160] * (128 / 255) + 255 * (127 / 255)
        assert np.abs(decoded[:, 80:160] - half).max() <= 0.5 + 1e-9
        np.testing.assert_array_equal(decoded[:, 160:], smooth[:, 160:])


def test_a_transparent_colour_of_a_palette_is_white(smooth: RGB) -> None:
    """The transparent colour is in a separate chunk, tRNS."""
    indexed = Image.fromarray(smooth).quantize(8)
    out = io.BytesIO()
    indexed.save(out, "PNG", transparency=3)
    expected = np.asarray(indexed.convert("RGB")).copy()
    expected[np.asarray(indexed) == 3] = 255
    np.testing.assert_array_equal(image_files.decode(out.getvalue()), expected)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_colour_of_a_grey_png_is_white_at_every_depth(depth: int) -> None:
    """Pillow compares the colour in units of the file with pixels that it has scaled to 8 bits, or clipped."""
    values = np.arange(1 << min(depth, 8))  # one row of every grey
    values = values * 256 + 77 if depth == 16 else values
    bits = (values[:, None] >> np.arange(depth)[::-1]) & 1
    row = b"\0" + np.packbits(bits.astype(np.uint8)).tobytes()
    transparent = values[-2]
    data = png_of(len(values), 1, row, depth, 0, chunk(b"tRNS", struct.pack(">H", transparent)))
    expected = values >> 8 if depth == 16 else values * 255 // values[-1]
    expected[-2] = 255
    np.testing.assert_array_equal(image_files.decode(data), np.repeat(expected[None, :, None], 3, 2))


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_an_rgb_png_is_white(smooth: RGB, depth: int) -> None:
    """All 16 bits must match: pixels that differ in the lower 8 bits only are opaque."""
    samples = smooth[:40, :40].astype(int) * (257 if depth == 16 else 1)
    colour = samples[3, 5].copy()
    samples[7, 9], samples[8, 9] = colour, colour + np.array([0, 0, 1])
    packed = samples.astype(">u2" if depth == 16 else "u1").reshape(40, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    expected = (samples >> 8 if depth == 16 else samples).copy()
    expected[(samples == colour).all(2)] = 255
    data = png_of(40, 40, rows, depth, 2, chunk(b"tRNS", struct.pack(">3H", *colour)))
    np.testing.assert_array_equal(image_files.decode(data), expected)
    assert (expected[7, 9] == 255).all()
    assert (expected[8, 9] != 255).any()


@pytest.mark.parametrize("restart", [0, 2])
@pytest.mark.parametrize(("across", "down"), SAMPLINGS)
def test_jpegs_of_every_chroma_sampling_are_read(across: int, down: int, restart: int) -> None:
    """simplejpeg refuses 3x1, 3x2 and 4:1:0, which old cameras and video tools wrote."""
    luma = np.random.default_rng(2).integers(0, 256, (6 * down, 6 * across)).astype(np.uint8)
    data = jpeg_of(luma, across, down, restart)
    expected = luma.repeat(8, 0).repeat(8, 1)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(image_files.decode(data), expected)
    views = [pixels.centre_view(file, 32).astype(int) for file in (data, pixels.png(expected))]
    assert np.abs(views[0] - views[1]).max() <= 8  # fast decodes the usual 2x2 at a reduced scale


@pytest.mark.parametrize("restart", [0, 2])
@pytest.mark.parametrize(("across", "down"), SAMPLINGS)
def test_a_jpeg_of_any_chroma_sampling_with_missing_data_is_an_error(across: int, down: int, restart: int) -> None:
    """libjpeg fills the rest with grey and warns, but PIL drops its warnings."""
    luma = np.random.default_rng(2).integers(0, 256, (6 * down, 6 * across)).astype(np.uint8)
    data = jpeg_of(luma, across, down, restart)
    start = data.index(b"\xff\xda") + 14
    for length in range(start, len(data) - 3, 5):
        both_refuse(data[:length] + b"\xff\xd9", "damaged JPEG")
        both_refuse(data[:length], "damaged JPEG")


@pytest.mark.parametrize("colourspace", ["CMYK", "YCCK"])
def test_cmyk_is_read_as_adobe_writes_it(smooth: RGB, colourspace: str) -> None:
    """Adobe inverts CMYK, as in 23 images of ImageNet. Pillow writes CMYK here, and simplejpeg YCCK."""
    cmyk = Image.fromarray(smooth).convert("CMYK")
    if colourspace == "CMYK":
        out = io.BytesIO()
        cmyk.save(out, "JPEG", quality=95)
        data = out.getvalue()
    else:
        data = simplejpeg.encode_jpeg(255 - np.asarray(cmyk), 95, "CMYK")
    assert simplejpeg.decode_jpeg_header(data)[2] == colourspace
    assert np.abs(image_files.decode(data).astype(int) - smooth).mean() < 3
    assert np.abs(pixels.centre_view(data, 32).astype(int) - pixels.centre_view(pixels.png(smooth), 32)).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("pipeline", [pixels.FAST, pixels.REFERENCE])
def test_bytes_after_the_image_are_ignored(smooth: RGB, kind: str, pipeline: str) -> None:
    """Cameras and web servers append data."""
    data = encoded(smooth, kind)
    plain = pixels.centre_view(data, 32, pipeline)
    np.testing.assert_array_equal(pixels.centre_view(data + b"\0\xff\xd8\xff more", 32, pipeline), plain)


def test_progressive_jpegs_decode_to_the_same_image(smooth: RGB) -> None:
    """A progressive JPEG has the same coefficients in another order."""
    plain, progressive = (encoded(smooth, "JPEG", progressive=p) for p in (False, True))
    assert plain != progressive
    np.testing.assert_array_equal(image_files.decode(plain), image_files.decode(progressive))
    np.testing.assert_array_equal(pixels.centre_view(plain, 32), pixels.centre_view(progressive, 32))


def test_an_animation_decodes_to_its_first_image(smooth: RGB) -> None:
    """Any choice is valid if it is always the same."""
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(smooth, kind, save_all=True, append_images=[Image.fromarray(255 - smooth)], **options)
        np.testing.assert_array_equal(image_files.decode(data), smooth)


# ------------------------------------------------------------------------------------------------ errors


def both_refuse(data: bytes, reason: str) -> None:
    """Both pipelines must reject the same files, or the rows of a store would depend on its pipeline."""
    for pipeline in (pixels.FAST, pixels.REFERENCE):
        with pytest.raises(ImageError, match=reason) as caught:
            pixels.centre_view(data, 32, pipeline)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("WEBP", "RGB")]
)
def test_an_image_truncated_anywhere_is_an_error(smooth: RGB, kind: str, mode: str) -> None:
    """libjpeg fills the rest with grey; a cut near the end loses only the last blocks."""
    data = encoded(smooth, kind, mode)
    for length in (*range(12, len(data), len(data) // 12), len(data) - 100, len(data) - 2):
        both_refuse(data[:length], "damaged")


def test_a_jpeg_with_too_few_rows_is_an_error(smooth: RGB) -> None:
    """A truncated file with a valid end marker: Pillow reads it without an error, and half of the image is grey."""
    for progressive in (False, True):
        data = encoded(smooth, "JPEG", progressive=progressive)
        start = data.index(b"\xff\xda")
        both_refuse(data[: (start + len(data)) // 2] + b"\xff\xd9", "premature end")
    taller = bytearray(encoded(smooth, "JPEG"))
    frame = taller.index(b"\xff\xc0")
    taller[frame + 5 : frame + 7] = (480).to_bytes(2, "big")
    both_refuse(bytes(taller), "premature end")


def test_a_png_with_too_few_rows_is_an_error() -> None:
    """Pillow leaves them black without an error."""
    row = b"\0" + b"\xff" * 300
    Image.open(io.BytesIO(png_of(100, 100, row * 60))).load()
    both_refuse(png_of(100, 100, row * 60), "bytes of rows")


def test_a_flipped_bit_in_a_png_is_an_error(smooth: RGB) -> None:
    """Pillow does not verify the checksums of the pixels."""
    data = encoded(smooth[:40, :40], "PNG")
    rng = np.random.default_rng(5)
    for position in rng.integers(8, len(data) - 12, 60):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        both_refuse(bytes(flipped), "PNG|pixels")


def test_headers_with_a_false_size_are_errors(smooth: RGB) -> None:
    """libwebp allocates the canvas of the header when Pillow only opens the file."""
    webp = bytearray(encoded(smooth, "WEBP"))
    webp[26:30] = struct.pack("<HH", 16383, 16383)
    both_refuse(bytes(webp), "more than the limit")
    webp[26:30] = struct.pack("<HH", 1000, 1000)
    both_refuse(bytes(webp), "damaged WEBP")
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff\xff\xff\xff"
    both_refuse(b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas, "more than the limit")
    jpeg = bytearray(encoded(smooth, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    both_refuse(bytes(jpeg), "more than the limit")


def test_a_jpeg_of_too_many_scans_is_an_error(smooth: RGB) -> None:
    """A scan has a few bytes and takes as long as an image: a megabyte of scans would take an hour."""
    data = encoded(smooth, "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    both_refuse(data[:-2] + last_scan * 300 + b"\xff\xd9", "scans")
    large = data.replace(struct.pack(">HH", 240, 320), struct.pack(">HH", 8000, 8000))
    both_refuse(large[:-2] + last_scan * 100 + b"\xff\xd9", "more than 67 scans")


def test_files_of_too_many_parts_are_errors(smooth: RGB) -> None:
    """A hundred megabytes of empty parts would take two gigabytes."""
    jpeg, png = encoded(smooth, "JPEG"), encoded(smooth, "PNG")
    both_refuse(jpeg[:2] + b"\xff\xe1\0\2" * 70_000 + jpeg[2:], "more than 65536 segments")
    both_refuse(png[:33] + chunk(b"IDAT", b"") * 270_000 + png[33:], "more than 262144 chunks")
    np.testing.assert_array_equal(image_files.decode(png[:33] + chunk(b"IDAT", b"") * 70_000 + png[33:]), smooth)


@pytest.mark.parametrize("stray", [b"", b"\0\0", b"\xff\0", b"\xff\xff"])
@pytest.mark.parametrize("frame", sorted(jpeg_segments.LOSSLESS))
def test_a_lossless_jpeg_is_an_error_before_a_decoder_runs(smooth: RGB, frame: int, stray: bytes) -> None:
    """libjpeg-turbo writes out of bounds when it scales one; stray bytes before the marker must not hide it."""
    start, rest = encoded(smooth, "JPEG").split(b"\xff\xc0", 1)
    both_refuse(start + stray + bytes([0xFF, frame]) + rest, "lossless or hierarchical JPEG")


def test_only_scans_of_the_image_count(smooth: RGB) -> None:
    """Motion photos append a video; metadata may contain a thumbnail of many scans."""
    data = encoded(smooth, "JPEG", progressive=True)
    scans = b"\xff\xda" * 300
    metadata = b"\xff\xe5" + struct.pack(">H", 2 + len(scans)) + scans
    for changed in (data + scans, data[:2] + metadata + data[2:]):
        np.testing.assert_array_equal(image_files.decode(changed), image_files.decode(data))
        np.testing.assert_array_equal(pixels.centre_view(changed, 32), pixels.centre_view(data, 32))


def _second_revision(data: bytes) -> bytes:
    return data.replace(b"JFIF\0\1\1", b"JFIF\0\2\1", 1)


def _empty_jfif(data: bytes) -> bytes:
    return data[:2] + b"\xff\xe0\0\2" + data[20:]


def _scan_parameters(data: bytes) -> bytes:
    at = data.index(b"\xff\xda") + 11  # three components
    return data[:at] + b"\0\0\0" + data[at + 3 :]


def _bytes_before_tables(data: bytes) -> bytes:
    return data.replace(b"\xff\xdb", b"\0\0\xff\xdb", 1)


def _bytes_before_the_end(data: bytes) -> bytes:
    return data[:-2] + bytes(240) + data[-2:]


@pytest.mark.parametrize("pipeline", [pixels.FAST, pixels.REFERENCE])
@pytest.mark.parametrize(
    "change", [_second_revision, _empty_jfif, _scan_parameters, _bytes_before_tables, _bytes_before_the_end]
)
def test_whole_images_with_warnings_of_libjpeg_are_read(
    smooth: RGB, change: Callable[[bytes], bytes], pipeline: str
) -> None:
    """Phones and editors write such files, and every other program reads them."""
    data = encoded(smooth, "JPEG")
    changed = change(data)
    assert changed != data
    np.testing.assert_array_equal(image_files.decode(changed), image_files.decode(data))
    np.testing.assert_array_equal(pixels.centre_view(changed, 32, pipeline), pixels.centre_view(data, 32, pipeline))


@pytest.mark.parametrize("change", [_second_revision, _bytes_before_tables, _bytes_before_the_end])
def test_a_harmless_warning_does_not_hide_a_truncation(smooth: RGB, change: Callable[[bytes], bytes]) -> None:
    data = encoded(smooth, "JPEG")
    for cut in (data[: len(data) // 2], data[: len(data) // 2] + data[-2:]):
        both_refuse(change(cut), "damaged JPEG")


def test_damage_that_a_strict_decoder_detects_stays_an_error(smooth: RGB) -> None:
    """Flipped bits often end the decoding early; the bytes that remain are not padding."""
    data = encoded(smooth, "JPEG")
    start, detected = data.index(b"\xff\xda") + 14, 0
    for at in range(start, len(data) - 2, 3):
        damaged = data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
        try:
            simplejpeg.decode_jpeg(damaged, strict=True)
        except ValueError:
            detected += 1
            both_refuse(damaged, "damaged JPEG")
    assert detected > 10


def test_damage_in_chunks_of_a_png_without_pixels_does_not_matter(smooth: RGB) -> None:
    data = encoded(smooth, "PNG")
    text = struct.pack(">I", 4) + b"tEXta\0bc" + b"sum?"
    np.testing.assert_array_equal(image_files.decode(data[:33] + text + data[33:]), smooth)


def test_a_webp_of_28_bytes_is_read() -> None:
    """A black image of 64 x 64 pixels."""
    data = bytes.fromhex("5249464614000000574542505650384c080000002f3fc00f00888808")
    assert not image_files.decode(data).any()
    assert image_files.decode(data).shape == (64, 64, 3)


def test_the_reason_is_the_same_every_time() -> None:
    """The quarantine list of a repeated preparation is equal byte by byte."""
    header = struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    cut = png_chunks.MAGIC + header + struct.pack(">I", zlib.crc32(header[4:]))
    with pytest.raises(ImageError) as caught:
        image_files.decode(cut)
    assert " at 0x" not in str(caught.value)


def test_the_format_is_detected_from_the_bytes_and_not_from_the_name(smooth: RGB) -> None:
    """ImageNet's n02105855_2933.JPEG is a PNG."""
    both_refuse(b"<!DOCTYPE html><title>404 Not Found</title>" * 100, "not a JPEG, PNG, WEBP")
    both_refuse(b"\xff\xd8\xff" + b"<html>" * 100, "damaged JPEG")
    assert pixels.centre_view(encoded(smooth, "PNG"), 32).shape == (32, 32, 3)


STRIPES = (np.indices((48, 40)).sum(0)[..., None] * [1, 2, 3] % 256).astype(np.uint8)
WHOLE = [encoded(STRIPES, kind) for kind in ("JPEG", "PNG", "WEBP")] + [encoded(STRIPES, "JPEG", progressive=True)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("read", [image_files.decode, lambda data: pixels.centre_view(data, 8)], ids=["decode", "fast"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.sampled_from(WHOLE),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    cut=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_damaged_bytes_raise_an_image_error_or_decode(
    read: Callable[[bytes], RGB], data: bytes, flips: list[tuple[float, int]], cut: float
) -> None:
    """Decoders raise SyntaxError, struct.error, OSError and others; an unhandled one would end a job over one file."""
    damaged = bytearray(data)
    for where, value in flips:
        damaged[int(where * len(data))] = value
    try:
        rgb = read(bytes(damaged[: int(cut * len(data))]))
    except ImageError:
        return
    assert rgb.ndim == 3
    assert rgb.shape[2] == 3
    assert rgb.dtype == np.uint8
