"""What goes over the wire: the bodies of requests, what they mean to a release, and how pictures come back.

A picture comes as an encoded file in base64, of which the evaluation view is taken, or as the tokens of a store. Limits
are checked before the work they limit: lengths before base64, a file's header before its pixels.
"""

import base64
import binascii
import io
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from igpt_ray.data import image_files, pixels
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import Tokens
from igpt_ray.errors import ImageError, SettingError
from igpt_ray.evaluate.features import Pooling
from igpt_ray.generate.engine import Request
from igpt_ray.weights import ReleaseConfig

MAX_BODY = 16 << 20
"""Bytes of a request, counted as they come."""
MAX_BASE64 = 14_000_000
"""Characters: a file of about 10 MB."""
MAX_PIXELS, MAX_SIDE = 1 << 24, 1 << 14
"""Of a picture, by its header; less than what jobs take, for here anyone may send it."""
MAX_SAMPLES = 16
MAX_PICTURES = 64
"""In a request."""

Base64 = Annotated[str, Field(max_length=MAX_BASE64)]
Colour = Annotated[int, Field(ge=0, lt=1 << 16)]
Picture = Annotated[list[Colour], Field(min_length=1, max_length=1 << 16)]
Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
Bit = Annotated[int, Field(ge=0, le=1)]


def _several(value: Any) -> Any:
    """One picture is a list of one."""
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
    """One of GET /v1/models; the first of them if left out."""
    image: Images = []
    """A JPEG, PNG or WebP file in base64, or several."""
    tokens: Pictures = []
    """Instead of files: the colours of a picture in raster order, or of several."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.image) == bool(self.tokens):
            raise ValueError("send image or tokens, one of them")
        return self


class CompletionRequest(BaseRequest):
    """Finish a picture, n times."""

    rows: Annotated[int, Field(ge=0)] | None = None
    """Rows of pixels that are given, from the top; half of them if this and `mask` are left out."""
    mask: Base64 | Annotated[list[list[Bit]], Field(max_length=256)] | None = None
    """Instead of `rows`: a PNG in base64 that is transparent where to paint, cut and resized like the picture; or rows
    of 1 (given) and 0 (to paint)."""
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    """Completions."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Divides the logits; 0 takes the likeliest colour."""
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    """Sample among the k likeliest colours; 0 is all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest colours that together have this probability."""
    seed: Seed | Annotated[list[Seed], Field(min_length=1, max_length=MAX_SAMPLES)] = 0
    """Completion i has seed + i; or a list with a seed for each. A seed paints the same picture whenever, and beside
    whatever, it is asked for."""
    response_format: Literal["b64_png", "tokens"] = "b64_png"
    """Pictures as PNG files in base64, or as colours in raster order."""
    stream: bool = False
    """Send each row of pixels as it is finished, as server-sent events."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rows is not None and self.mask is not None:
            raise ValueError("send rows or mask, not both")
        if len(self.image) + len(self.tokens) > 1:
            raise ValueError("send one picture; n asks for several completions of it")
        if isinstance(self.seed, list) and len(self.seed) != self.n:
            raise ValueError(f"{len(self.seed)} seeds for n = {self.n} completions")
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.seed) if isinstance(self.seed, list) else tuple(self.seed + i for i in range(self.n))


class FeaturesRequest(BaseRequest):
    """What the network makes of pictures at a layer."""

    layer: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    """A block's ln_1 output, or at the number of blocks ln_f's; the middle one if left out."""
    pooling: Pooling = "mean"
    """Over positions."""


class ClassifyRequest(BaseRequest):
    """What pictures show, by a head of the model."""

    head: Annotated[str, Field(max_length=64)] = ""
    """One of the model's heads, see GET /v1/models; the first of them if left out."""
    top_k: Annotated[int, Field(ge=1, lt=1 << 31)] = 5
    """Classes to name, the likeliest first."""


class ScoreRequest(BaseRequest):
    """How surprising pictures are."""

    per_pixel: bool = False
    """Also the nats of every pixel, and the colours that were scored."""


class Reader:
    """What requests mean to a release: pictures as its tokens, masks as its positions."""

    def __init__(self, about: ReleaseConfig, palette: Palette):
        self.about = about
        self.palette = palette
        self.n_px = about.model.n_px
        palette.encode(np.zeros((1, 3), np.uint8))  # its table is made before anyone waits for it

    def pictures(self, asked: BaseRequest) -> Tokens:
        """(N, T). Raises `ImageError` or `SettingError` for what cannot be read."""
        if asked.image:
            return np.stack([self._encoded(image) for image in asked.image])
        T, V = self.about.model.n_positions, self.about.model.n_vocab
        for tokens in asked.tokens:
            if len(tokens) != T or max(tokens) >= V:
                raise SettingError(
                    f"tokens: {len(tokens)} colours up to {max(tokens)}; this model's pictures have {T}, below {V}"
                )
        return np.array(asked.tokens, np.uint16)

    def request(self, asked: CompletionRequest) -> Request:
        """What the engine is to paint."""
        tokens = self.pictures(asked)[0]
        return Request(tokens, self.given(asked), asked.seeds, asked.temperature, asked.top_k, asked.top_p)

    def given(self, asked: CompletionRequest) -> NDArray[np.bool_]:
        """(T,): which pixels stay as they are."""
        n_px = self.n_px
        if isinstance(asked.mask, str):
            return _opaque(_bytes(asked.mask, "mask"), n_px).reshape(-1)
        if asked.mask is not None:
            if len(asked.mask) != n_px or any(len(row) != n_px for row in asked.mask):
                raise SettingError(f"mask: expected {n_px} rows of {n_px} numbers, 1 where given and 0 where to paint")
            return np.array(asked.mask, np.bool_).reshape(-1)
        rows = n_px // 2 if asked.rows is None else asked.rows
        if rows > n_px:
            raise SettingError(f"rows is {rows}; a picture has {n_px}")
        return np.arange(n_px * n_px) < rows * n_px

    def shown(self, tokens: NDArray[np.integer], form: str) -> dict[str, Any]:
        """A picture, or some rows of one, as a response says it."""
        if form == "tokens":
            return {"tokens": tokens.tolist()}
        return {"b64_png": base64.b64encode(self.png(tokens)).decode()}

    def png(self, tokens: NDArray[np.integer]) -> bytes:
        return pixels.png(self.palette.decode(tokens).reshape(-1, self.n_px, 3))

    def _encoded(self, image: str) -> Tokens:
        """(T,): the evaluation view of an encoded picture."""
        data = _bytes(image, "image")
        _check_size(data)
        return self.palette.encode(pixels.centre_view(data, self.n_px, self.about.kind.pipeline)).reshape(-1)


def _bytes(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{what} is not base64: {error}") from error


def _check_size(data: bytes) -> None:
    header = image_files.header_of(data)
    if header.width * header.height > MAX_PIXELS or max(header.width, header.height) > MAX_SIDE:
        raise ImageError(
            f"{header.width} x {header.height} pixels: at most {MAX_PIXELS} are taken, and {MAX_SIDE} on a side"
        )


def _opaque(data: bytes, n_px: int) -> NDArray[np.bool_]:
    """(n_px, n_px) where a mask is not transparent, by the greater part of what falls into a pixel."""
    _check_size(data)
    if not data.startswith(image_files.PNG_MAGIC):
        raise ImageError("mask: expected a PNG, transparent where to paint")
    image_files.decode(data)  # refuses what is cut or damaged
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        alpha = picture.convert("RGBA").getchannel("A")
    side = min(alpha.size)
    left, top = (alpha.width - side) // 2, (alpha.height - side) // 2
    square = alpha.resize((n_px, n_px), Image.Resampling.BOX, (left, top, left + side, top + side))
    return np.asarray(square) >= 128
