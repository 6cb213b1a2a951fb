"""The demo's images: scikit-learn's handwritten digits (UCI, 8x8, 17 grey levels) in colour, as PNG files.

Each image has one of 4 foreground and one of 3 background colours, drawn from a seed, so that colour must be learnt:
a completion must continue the image in its own colours. The last 360 images are the test split. Their writers differ
from those of the first 1,437.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from igpt_ray.data import pixels

N_PX = 8
N_TRAIN = 1437
ENLARGED = 28
"""Pixels in the file per pixel of the digit: 224 a side, which the pixel pipeline reduces to exactly 8."""

FOREGROUNDS = np.array([(30, 30, 60), (190, 30, 45), (20, 105, 60), (110, 50, 150)])
BACKGROUNDS = np.array([(250, 244, 225), (205, 228, 248), (250, 214, 170)])


class Digit(NamedTuple):
    key: str
    """`train/7/0012.png`"""
    png: bytes


def digits(seed: int) -> Iterator[Digit]:
    """All 1,797 images in the order of the data set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng(seed)
    for i, (grey, label) in enumerate(zip(data.images, data.target, strict=True)):
        foreground, background = (
            FOREGROUNDS[rng.integers(len(FOREGROUNDS))],
            BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        )
        opacity = grey[:, :, None] / 16
        rgb = np.rint(background + opacity * (foreground - background)).astype(np.uint8)
        split = "train" if i < N_TRAIN else "test"
        yield Digit(f"{split}/{label}/{i:04d}.png", pixels.png(pixels.sheet([[rgb]], scale=ENLARGED, gap=0)))
