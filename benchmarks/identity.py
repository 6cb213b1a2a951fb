"""Tokens of images of n_px x n_px next to a direct look-up of the images' own pixels, and after a round trip by PNG.

Needs a store of the centre views. `equal_to_pil` and `equal_to_simplejpeg` are the shares of tokens that equal a
look-up of the pixels which PIL and simplejpeg decode; `equal_after_png` is the share of tokens that are the same after
they were written as PNG and read by the store's pipeline.
"""

import io
from collections import Counter
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from igpt_ray.data import pixels, sources
from igpt_ray.data.token_store import TokenStore, tokens_of
from igpt_ray.errors import SettingError
from igpt_ray.settings import Section, Uri


class BenchIdentityConfig(Section):
    """Compare the tokens of a store with a direct look-up of its JPEG files of n_px x n_px."""

    images: Uri
    """URI of the source of the store."""
    tokens: Uri
    """URI of the token store, prepared with --pixels.crop centre."""


def identity(settings: BenchIdentityConfig) -> dict[str, Any]:
    """Return the number of images and the three shares. Raises `SettingError` if an image is not n_px x n_px."""
    store = TokenStore.open(settings.tokens)
    palette, n_px, pipeline = store.palette(), store.kind.n_px, store.kind.pipeline
    stored = {
        (split, key): tokens.reshape(n_px, n_px)
        for split in store.manifest.splits
        for table in store.read_split(split)
        for key, tokens in zip(table["key"].to_pylist(), tokens_of(table), strict=True)
    }
    equal = Counter[str]()
    for unit in sources.plan(settings.images, 1000).units:
        for image in sources.read(unit):
            if isinstance(image, sources.UnreadableImage):
                continue
            tokens = stored[unit.split, image.key]
            with Image.open(io.BytesIO(image.data)) as picture:
                if picture.size != (n_px, n_px):
                    raise SettingError(f"{image.key} has {picture.size} pixels, expected {n_px} x {n_px}")
                by_pil = np.asarray(picture.convert("RGB"))
            again = pixels.centre_view(pixels.png(palette.decode(tokens)), n_px, pipeline)
            equal["images"] += 1
            equal["equal_to_pil"] += int((palette.encode(by_pil) == tokens).sum())
            equal["equal_to_simplejpeg"] += int((palette.encode(simplejpeg.decode_jpeg(image.data)) == tokens).sum())
            equal["equal_after_png"] += int((palette.encode(again) == tokens).sum())
    n_images = equal.pop("images")
    return {"pipeline": pipeline, "images": n_images, **{k: n / (n_images * n_px**2) for k, n in equal.items()}}
