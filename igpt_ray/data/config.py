"""Settings of palette fitting, preparation and verification."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from igpt_ray import storage
from igpt_ray.settings import Count, PoolConfig, Section, Uri

Layout = Literal[
    "folders", "classes", "flat", "kaggle", "tiny-imagenet", "cifar", "tars", "class-tars", "webdataset", "parquet"
]

OPENAI_PALETTE = "openai"
"""The value that selects OpenAI's own palette instead of a URI. A file of that name is `./openai`."""


def _palette(uri: str) -> str:
    return uri if uri == OPENAI_PALETTE else storage.absolute(uri)


PaletteUri = Annotated[str, AfterValidator(_palette)]


def _columns(words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        role, _, name = word.partition("=")
        if role not in ("image", "label") or not name:
            raise ValueError(f"{word!r} is not image=NAME or label=NAME, such as: --columns image=img label=fine_label")
    return words


Columns = Annotated[tuple[str, ...], AfterValidator(_columns)]
"""Names of Parquet columns, such as image=img and label=fine_label."""

PipelineName = Literal["fast", "reference"]
ViewName = Literal["imagenet", "direct", "imagenet-1"]


class PixelsConfig(Section):
    """How images become pixels. Palette and token store must have the same pipeline and view."""

    n_px: Annotated[int, Field(gt=0, le=224)] = 32
    """Pixels a side."""
    view: ViewName = "imagenet"
    """How an image becomes n_px x n_px: imagenet, the paper's resize to 224 and crop, but images of n_px x n_px are
    used as they are; direct, the centre square resized once, for small images such as CIFAR's and STL-10's; or
    imagenet-1, for older releases and palettes, which also resizes images of n_px x n_px."""
    crop: Literal["random", "centre"] = "random"
    """Views of the training images, the hold-out included: random crops, or the evaluation view. Other splits always
    use the centre crop. Images of the view direct, and of n_px x n_px, are shifted by up to n_px // 8 pixels and
    mirrored."""
    pipeline: PipelineName = "fast"
    """How images are decoded and resized: fast, in one step on a JPEG decoded at reduced scale; or reference, the
    paper's steps with PIL, three times slower."""


class PaletteConfig(Section):
    """Fit a palette to the training split of a folder or bucket of images."""

    source: Uri
    """URI of images in one of the layouts listed under layout."""
    layout: Layout | None = None
    """Structure of the source, see docs/data.md; None: detected."""
    columns: Columns = ()
    """Columns of Parquet files with unusual names, as image=NAME and label=NAME."""
    out: Uri
    """URI of the palette to write (.npy). A .json next to it records its origin, and a .png shows its colours."""
    k: Annotated[int, Field(ge=2, le=65536)] = 512
    """Number of colours."""
    images: Count = 10_000
    """Approximate number of images in the sample."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sample and of the clustering."""
    gpu: bool = False
    """Cluster on a GPU of the machine that runs the job; needs the extra [gpu]."""
    pixels: PixelsConfig = PixelsConfig()
    pool: PoolConfig = PoolConfig()


class PrepareConfig(Section):
    """Turn a folder or bucket of images into a committed token store."""

    source: Uri
    """URI of images in one of the layouts listed under layout."""
    layout: Layout | None = None
    """Structure of the source, see docs/data.md; None: detected."""
    columns: Columns = ()
    """Columns of Parquet files with unusual names, as image=NAME and label=NAME."""
    palette: PaletteUri
    """URI of the palette (.npy), or openai for OpenAI's own 512 colours."""
    tokens: Uri
    """URI of the token store to write or complete."""
    views: Count = 1
    """Number of differently cropped copies of the training split; epoch e reads view e mod views."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training images, drawn by key, that forms the split holdout for model selection. Paper: 4 %."""
    shard_images: Count = 10_000
    """Images per shard."""
    budget: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Largest share of unreadable images. They go to quarantine; above this share the job fails. A single unreadable
    image is allowed in any set, unless the budget is 0."""
    dry_run: bool = False
    """Only print the plan: layout, splits, classes, numbers of images, examples, and what is passed over. No image is
    decoded, and nothing is written."""
    pixels: PixelsConfig = PixelsConfig()
    pool: PoolConfig = PoolConfig()


class VerifyConfig(Section):
    """Check every byte of a token store, and compare some shards with the source."""

    tokens: Uri
    """URI of a token store."""
    remake: Annotated[int, Field(ge=0)] = 1
    """Number of shards, evenly spaced over the store, that are computed again from the source and compared."""
    remove: bool = False
    """Remove shards and quarantine lists that the manifest does not name, and temporary files of killed writes."""
    pool: PoolConfig = PoolConfig()
