"""The largest images that are decoded take less than 600 MiB in a process that does nothing else."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from image_cases import chunk, encoded, jpeg_of, png_of
from PIL import Image

from igpt_ray.data.image_files import MAX_BYTES, MAX_PIXELS, header_of
from igpt_ray.errors import ImageError

PEAK_MIB = 600
DECODE = """
import sys
from igpt_ray.data import pixels
data = open(sys.argv[1], "rb").read()
for n_px, pipeline in ((8, pixels.FAST), (32, pixels.REFERENCE)):
    assert pixels.centre_view(data, n_px, pipeline).shape == (n_px, n_px, 3)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def _grey(width: int, height: int, channels: int = 3) -> np.ndarray:
    rgb = np.full((height, width, channels), 128, np.uint8)
    rgb[::7, ::5] = 60
    return rgb


def _png(width: int, height: int, depth: int, colours: int, channels: int, more: bytes = b"") -> bytes:
    row = b"\0" + bytes([1, 2, 3, 4, 5, 6, 7, 8])[: channels * depth // 8] * width
    return png_of(width, height, row * height, depth, colours, more)


CASES: dict[str, Callable[[], bytes]] = {
    "png-rgba": lambda: _png(8192, 8192, 8, 6, 4),
    "png-rgb-16-transparent": lambda: _png(8192, 5900, 16, 2, 3, chunk(b"tRNS", bytes([1, 2, 3, 4, 5, 6]))),
    "png-one-row": lambda: _png(13_000_000, 1, 16, 6, 4),
    "jpeg": lambda: simplejpeg.encode_jpeg(_grey(8192, 8192)),
    "jpeg-progressive": lambda: encoded(_grey(8192, 6800), "JPEG", progressive=True, subsampling=0),
    "jpeg-cmyk": lambda: simplejpeg.encode_jpeg(_grey(8192, 7300, 4), colorspace="CMYK"),
    "jpeg-unusual": lambda: jpeg_of(_grey(1023, 720)[..., 0], 3, 1),
    "webp": lambda: encoded(_grey(5000, 5200), "WEBP", method=0),
    "webp-lossless-rgba": lambda: encoded(_grey(5000, 5200), "WEBP", "RGBA", lossless=True, quality=0, method=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_largest_images_stay_below_the_limit(tmp_path: Path, case: str) -> None:
    """Several workers share the memory of a node, and a file of a few kilobytes may hold 67 megapixels."""
    data = CASES[case]()
    header = header_of(data)
    assert header.n_bytes > 0.8 * MAX_BYTES or header.width * header.height == MAX_PIXELS
    (tmp_path / "image").write_bytes(data)
    command = [sys.executable, "-c", DECODE, str(tmp_path / "image")]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert int(output) < PEAK_MIB << 10


def test_an_image_above_the_limit_is_an_error_with_its_size(smooth: np.ndarray) -> None:
    """A WebP takes 20 bytes per pixel: 67 megapixels would take 1.3 GB."""
    Image.new("L", (8190, 8190)).save(out := io.BytesIO(), "WEBP", lossless=True, quality=0, method=0)
    with pytest.raises(ImageError, match="8190 x 8190 pixels take 1279 MiB to decode: more than the limit of 512"):
        header_of(out.getvalue())
