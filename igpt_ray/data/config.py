"""Settings of palette, token store and their check."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from igpt_ray import storage
from igpt_ray.settings import Count, PoolConfig, Section, Uri

Layout = Literal["folders", "kaggle", "tars", "webdataset", "parquet"]

OPENAI_PALETTE = "openai"
"""The word that names OpenAI's own palette where a URI is expected; a file of that name is `./openai`."""


def _palette(uri: str) -> str:
    return uri if uri == OPENAI_PALETTE else storage.absolute(uri)


PaletteUri = Annotated[str, AfterValidator(_palette)]


class PixelsConfig(Section):
    """How pictures become pixels. Palette and token store must agree on it."""

    n_px: Annotated[int, Field(gt=0, le=224)] = 32
    """Pixels a side."""
    crop: Literal["random", "centre"] = "random"
    """Training views, and what is held out of them: the paper's random crops, or the evaluation view. Other splits
    always take the centre."""
    pipeline: Literal["fast", "reference"] = "fast"
    """How they are decoded and resized: in one step on a smaller JPEG, or step by step with PIL, three times slower."""


class PaletteConfig(Section):
    """Fit a palette to the training split of a folder or bucket of images."""

    source: Uri
    """URI of images in one of the layouts below."""
    layout: Layout | None = None
    """Class folders, Kaggle's ImageNet, the original tars, WebDataset or Hugging Face's Parquet; None: recognise it."""
    out: Uri
    """URI of the palette to write, a .npy; beside it a .json says how it was made, and a .png shows the colours."""
    k: Annotated[int, Field(ge=2, le=65536)] = 512
    """Colours."""
    images: Count = 10_000
    """About how many images are sampled."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds the sample and the clustering."""
    gpu: bool = False
    """Cluster on the GPUs of the machine that runs the job; needs the extra [gpu]."""
    pixels: PixelsConfig = PixelsConfig()
    pool: PoolConfig = PoolConfig()


class PrepareConfig(Section):
    """Turn a folder or bucket of images into a committed token store."""

    source: Uri
    """URI of images in one of the layouts below."""
    layout: Layout | None = None
    """Class folders, Kaggle's ImageNet, the original tars, WebDataset or Hugging Face's Parquet; None: recognise it."""
    palette: PaletteUri
    """URI of the palette (.npy), or the word openai for OpenAI's own 512 colours."""
    tokens: Uri
    """URI of the token store to write, or to complete."""
    views: Count = 1
    """Differently cropped copies of the training split; epoch e reads view e mod views."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training images, drawn by key, that becomes the split holdout, to choose settings by. Paper: 4 %."""
    shard_images: Count = 10_000
    """Images per shard."""
    budget: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of images that may be unreadable (they go to quarantine) before the job fails."""
    pixels: PixelsConfig = PixelsConfig()
    pool: PoolConfig = PoolConfig()


class VerifyConfig(Section):
    """Check every byte of a token store, and that its shards are what the source gives."""

    tokens: Uri
    """URI of a token store."""
    remake: Annotated[int, Field(ge=0)] = 1
    """How many shards, spread over the store, are made again from the source and compared."""
    remove: bool = False
    """Remove shards and quarantine lists that the manifest does not name, and what killed writes left behind."""
    pool: PoolConfig = PoolConfig()
