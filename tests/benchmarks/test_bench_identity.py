"""The benchmark of small images: all tokens are equal with today's views, and some are not with the older one."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from benchmarks.identity import BenchIdentityConfig, identity
from igpt_ray import storage
from igpt_ray.data import prepare
from igpt_ray.data.config import PixelsConfig, PrepareConfig, ViewName
from igpt_ray.data.mapper import serial_map


@pytest.mark.parametrize("view", ["direct", "imagenet", "imagenet-1"])
def test_the_tokens_of_small_images_are_a_look_up(view: ViewName, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        rgb = rng.integers(0, 256, (16, 16, 3), np.uint8)
        storage.write(f"{tmp_path}/images/train/cat/{i}.jpg", simplejpeg.encode_jpeg(rgb))
    source, tokens = str(tmp_path / "images"), str(tmp_path / "tokens")
    pixels = PixelsConfig(n_px=16, crop="centre", view=view)
    prepare.prepare(PrepareConfig(source=source, palette="openai", tokens=tokens, pixels=pixels), serial_map)
    report = identity(BenchIdentityConfig(images=source, tokens=tokens))
    equal = [report[name] for name in ("equal_to_pil", "equal_to_simplejpeg", "equal_after_png")]
    assert report["images"] == 4
    assert all(share < 0.98 for share in equal) if view == "imagenet-1" else equal == [1, 1, 1]
