"""The Python interface to a release: PIL images in; completions, features, likelihoods and classes out.

model = igpt_ray.load("s3://bucket/runs/s1/release")
pictures = model.complete("photo.jpg", n=4, seed=0)
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from igpt_ray import storage, weights
from igpt_ray.data import pixels
from igpt_ray.data.token_format import Tokens
from igpt_ray.errors import CheckpointError, ImageError, SettingError
from igpt_ray.evaluate import features
from igpt_ray.evaluate.heads import Head, load_head
from igpt_ray.evaluate.likelihood import class_logits, image_nats
from igpt_ray.evaluate.logistic import probabilities
from igpt_ray.generate import completion
from igpt_ray.model.image_gpt import ImageGPT

Picture = Image.Image | str | Path | bytes | NDArray[np.uint8]
"""A PIL image, a path or URI, an encoded file, or an (H, W, 3) uint8 array."""

BATCH = 16
"""Images per forward pass."""


class Pretrained:
    """A loaded release. It converts the centre view of images to tokens by its pixel pipeline and palette."""

    def __init__(self, release: weights.Release, head: Head | None = None, head_model: ImageGPT | None = None):
        self.model, self.palette, self.config = release.model, release.palette, release.config
        self.head = head
        self.head_model = head_model or self.model
        """The model in the precision of the features that the head was fitted on."""

    @property
    def n_px(self) -> int:
        """Width and height of an image in pixels."""
        return self.config.model.n_px

    def tokens(self, images: Picture | Sequence[Picture]) -> Tokens:
        """(N, T) uint16, T = n_px^2 in raster order. Raises `ImageError` for an image that cannot be read."""
        listed = list(images) if isinstance(images, list | tuple) else [images]
        kind = self.config.kind
        views = [pixels.centre_view(_encoded(image), kind.n_px, kind.pipeline) for image in listed]
        return self.palette.encode(np.stack(views)).reshape(len(views), -1)

    def image(self, tokens: Tokens) -> Image.Image:
        """(T,) -> a PIL image of n_px x n_px pixels."""
        return Image.fromarray(self.palette.decode(tokens).reshape(self.n_px, self.n_px, 3))

    def complete(
        self,
        image: Picture,
        n: int = 4,
        rows: int | None = None,
        mask: NDArray[np.bool_] | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[Image.Image]:
        """Complete the image: `n` samples of n_px x n_px pixels.

        The prompt is the top `rows` rows (default: half of them), or the pixels where `mask`, (n_px, n_px), is True.
        Sample i uses `seed + i`, as the server does, and is a function of it. Raises `SettingError` if rows or mask are
        invalid or both are set, and `CheckpointError` for a release of the masked objective.
        """
        weights.check_next(self.config, "this release")
        if rows is not None and mask is not None:
            raise SettingError("set rows or mask, not both")
        if mask is not None and mask.shape != (self.n_px, self.n_px):
            raise SettingError(f"mask has shape {mask.shape}: expected {(self.n_px, self.n_px)}, True in the prompt")
        rows = self.n_px // 2 if rows is None else rows
        if not 0 <= rows <= self.n_px:
            raise SettingError(f"rows is {rows}: expected 0 to {self.n_px}")
        flat = np.arange(self.n_px**2) < rows * self.n_px if mask is None else mask.reshape(-1)
        prompt_mask = torch.from_numpy(flat.astype(np.bool_))[None]
        start = torch.from_numpy(self.tokens(image).astype(np.int64)).to(self.model.wpe.device)
        seeds = [seed + i for i in range(n)]
        samples = completion.complete(self.model, start, n, seeds, temperature, top_k, top_p, prompt_mask)
        return [self.image(tokens) for tokens in samples.cpu().numpy()]

    def features(
        self, images: Picture | Sequence[Picture], layer: int, pooling: features.Pooling = "mean"
    ) -> NDArray[np.float32]:
        """(N, C): the ln_1 output of block `layer`, or the ln_f output if `layer` is n_layer, pooled over positions.

        A masked model returns (N, masks, C); its random masks are a function of the index in `images`.
        """
        layers = features.check_layers([layer], self.config.model.n_layer)
        tokens = self.tokens(images)
        return features.pooled(self.model, tokens, _keys(tokens), layers, pooling, BATCH)[..., 0, :]

    def score(self, images: Picture | Sequence[Picture]) -> NDArray[np.float64]:
        """(N,): nats per image, summed over its n_px^2 tokens. Raises `CheckpointError` for a masked model."""
        weights.check_next(self.config, "this release")
        return image_nats(self.model, self.tokens(images), BATCH)

    def classify(self, image: Picture) -> dict[str, float]:
        """Class name -> probability, in descending order, from `head` or the class head of a fine-tuned release.

        Raises `CheckpointError` if there is no head.
        """
        tokens = self.tokens(image)
        if self.head is not None:
            p, classes = self.head.probabilities(self.head_model, tokens, _keys(tokens), BATCH), self.head.classes
        elif K := self.config.model.n_class:
            p = probabilities(class_logits(self.model, tokens, _keys(tokens), BATCH))
            classes = self.config.classes if len(self.config.classes) == K else [str(k) for k in range(K)]
        else:
            raise CheckpointError(
                "this release has no class head: load a fine-tuned release, or pass a probe's head to load()"
            )
        row = p[0].mean(0) if p.ndim == 3 else p[0]
        return {classes[k]: float(row[k]) for k in np.argsort(-row, kind="stable")}


def load(uri: str | Path, head: str | Path | None = None, device: str = "cpu") -> Pretrained:
    """Load a release from a path or URI, and optionally the head that jobs/probe.py wrote to the folder `head`.

    Raises `CheckpointError` or `FeatureError` if one of them is missing or damaged, or the head is of another release.
    """
    release = weights.load_release(storage.absolute(str(uri)), device)
    fitted = None if head is None else load_head(storage.absolute(str(head)))
    if fitted is not None and fitted.release != release.config.sha256:
        raise CheckpointError(f"the head at {head} was fitted on another release than {uri}")
    if fitted is not None and fitted.precision != "float32":
        model = features.network(storage.absolute(str(uri)), device, None, fitted.precision)
        return Pretrained(release, fitted, model)
    return Pretrained(release, fitted)


def _encoded(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return storage.read(storage.absolute(str(image)))
    if isinstance(image, Image.Image):
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return pixels.png(image)
    kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise ImageError(f"got {kind}: expected a PIL image, a path, encoded bytes, or an (H, W, 3) uint8 array")


def _keys(tokens: Tokens) -> list[str]:
    """Image keys, which seed the random masks of a masked model."""
    return [str(i) for i in range(len(tokens))]
