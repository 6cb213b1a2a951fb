"""Request bodies, their conversion to tokens, and the encoding of images in answers.

An image is an encoded file in base64, of which the evaluation view is tokenized, or a list of tokens. Limits are
checked before the work that they limit: lengths before base64 is decoded, the headers of files before their pixels
(`decoder_pool.py`).
"""

import asyncio
import base64
import binascii
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from igpt_ray.data import pixels
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_format import Tokens
from igpt_ray.errors import ImageError, SettingError
from igpt_ray.evaluate.features import Pooling
from igpt_ray.generate.engine import Request
from igpt_ray.serve.decoder_pool import DecoderPool
from igpt_ray.weights import ReleaseConfig

MAX_BODY = 16 << 20
"""Largest request in bytes."""
MAX_BASE64 = 14_000_000
"""Largest image in base64 characters, about 10 MB."""
MAX_SAMPLES = 16
MAX_PICTURES = 64
"""Images per request."""

Base64 = Annotated[str, Field(max_length=MAX_BASE64)]
Colour = Annotated[int, Field(ge=0, lt=1 << 16)]
Picture = Annotated[list[Colour], Field(min_length=1, max_length=1 << 16)]
Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
Bit = Annotated[int, Field(ge=0, le=1)]


def _several(value: Any) -> Any:
    """A single image becomes a list."""
    one = isinstance(value, str) or (isinstance(value, list) and value and not isinstance(value[0], (str, list)))
    return [value] if one else value


Images = Annotated[
    list[Base64], BeforeValidator(_several, json_schema_input_type=str | list[str]), Field(max_length=MAX_PICTURES)
]
Pictures = Annotated[
    list[Picture],
    BeforeValidator(_several, json_schema_input_type=list[int] | list[list[int]]),
    Field(max_length=MAX_PICTURES),
]


class BaseRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, frozen=True)

    model: Annotated[str, Field(max_length=64)] = ""
    """Model, see GET /v1/models. Default: the first."""
    image: Images = []
    """One or several JPEG, PNG or WebP files in base64."""
    tokens: Pictures = []
    """Instead of `image`: tokens of one or several images in raster order."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.image) == bool(self.tokens):
            raise ValueError("send exactly one of image and tokens")
        return self


class CompletionRequest(BaseRequest):
    """Complete an image n times."""

    rows: Annotated[int, Field(ge=0)] | None = None
    """Rows of pixels in the prompt, from the top. Default without `mask`: half of the image."""
    mask: Base64 | Annotated[list[list[Bit]], Field(max_length=256)] | None = None
    """Instead of `rows`: a PNG in base64, transparent at the pixels to generate, which is cropped and resized like the
    image (its colours have no meaning); or rows of 1 (prompt) and 0 (generate)."""
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    """Number of completions."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Divisor of the logits; 0 takes the most likely colour."""
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    """Sample from the k most likely colours; 0 for all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely colours that together have this probability."""
    seed: Seed | Annotated[list[Seed], Field(min_length=1, max_length=MAX_SAMPLES)] = 0
    """Completion i uses seed + i; or a list with one seed per completion. The same seed gives the same completion,
    whatever else the server does."""
    response_format: Literal["b64_png", "tokens"] = "b64_png"
    """Images as PNG files in base64, or as tokens in raster order."""
    stream: bool = False
    """Send each row of pixels when it is finished, as server-sent events."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rows is not None and self.mask is not None:
            raise ValueError("send rows or mask, not both")
        if len(self.image) + len(self.tokens) > 1:
            raise ValueError("send one image; n is the number of its completions")
        if isinstance(self.seed, list) and len(self.seed) != self.n:
            raise ValueError(f"{len(self.seed)} seeds for n = {self.n} completions")
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.seed) if isinstance(self.seed, list) else tuple(self.seed + i for i in range(self.n))


class FeaturesRequest(BaseRequest):
    """Features of images at a layer."""

    layer: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    """Layer l is the output of block l's ln_1; the number of blocks stands for ln_f. Default: the middle layer."""
    pooling: Pooling = "mean"
    """Pooling over positions."""


class ClassifyRequest(BaseRequest):
    """Classes of images, by a head of the model."""

    head: Annotated[str, Field(max_length=64)] = ""
    """Head of the model, see GET /v1/models. Default: the first."""
    top_k: Annotated[int, Field(ge=1, lt=1 << 31)] = 5
    """Number of classes in the answer, most likely first."""


class ScoreRequest(BaseRequest):
    """Negative log-likelihood of images."""

    per_pixel: bool = False
    """Also return the nats of every pixel, and the tokens."""


class Reader:
    """Converts requests to tokens and masks of a release, and tokens to images."""

    def __init__(self, release: ReleaseConfig, palette: Palette, decoders: DecoderPool):
        self.release = release
        self.palette = palette
        self.decoders = decoders
        self.n_px = release.model.n_px
        palette.encode(np.zeros((1, 3), np.uint8))  # builds the lookup table before the first request

    async def image_tokens(self, body: BaseRequest) -> Tokens:
        """Tokens (N, T). Raises `ImageError` or `SettingError` for images that cannot be read."""
        T, V = self.release.model.n_positions, self.release.model.n_vocab
        if body.image:
            files = await asyncio.to_thread(lambda: [_bytes(image, "image") for image in body.image])
            pipeline = self.release.kind.pipeline
            views = await self.decoders.decode(files, pixels.centre_view, self.n_px, pipeline)
            return (await asyncio.to_thread(self.palette.encode, views)).reshape(-1, T)
        for tokens in body.tokens:
            if len(tokens) != T or max(tokens) >= V:
                raise SettingError(
                    f"tokens: {len(tokens)} colours up to {max(tokens)}; this model's images have {T}, below {V}"
                )
        return np.array(body.tokens, np.uint16)

    async def request(self, body: CompletionRequest) -> Request:
        """The request to the engine."""
        mask = await self.prompt_mask(body)
        tokens = (await self.image_tokens(body))[0]
        return Request(tokens, mask, body.seeds, body.temperature, body.top_k, body.top_p)

    async def prompt_mask(self, body: CompletionRequest) -> NDArray[np.bool_]:
        """(T,) True for the pixels of the prompt. Raises `SettingError` for a mask without pixels to generate."""
        n_px = self.n_px
        if body.mask is None:
            rows = n_px // 2 if body.rows is None else body.rows
            if rows > n_px:
                raise SettingError(f"rows is {rows}, expected at most {n_px}")
            return np.arange(n_px * n_px) < rows * n_px
        if isinstance(body.mask, str):
            file = await asyncio.to_thread(_bytes, body.mask, "mask")
            mask = await self.decoders.decode([file], pixels.mean_alpha, n_px) >= 128
        elif len(body.mask) != n_px or any(len(row) != n_px for row in body.mask):
            raise SettingError(f"mask: expected {n_px} rows of {n_px} numbers, 1 for the prompt, 0 to generate")
        else:
            mask = np.array(body.mask, np.bool_)
        if mask.all():
            raise SettingError(
                "mask: nothing to generate: expected a PNG that is transparent at the pixels to generate (black and"
                " white have no meaning), or rows with 0 at these pixels"
            )
        return mask.reshape(-1)

    def encoded(self, tokens: NDArray[np.integer], form: str) -> dict[str, Any]:
        """An image, or some rows of it, in the format of the answer."""
        if form == "tokens":
            return {"tokens": tokens.tolist()}
        return {"b64_png": base64.b64encode(self.png(tokens)).decode()}

    def png(self, tokens: NDArray[np.integer]) -> bytes:
        return pixels.png(self.palette.decode(tokens).reshape(-1, self.n_px, 3))


def _bytes(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{what} is not base64: {error}") from error
