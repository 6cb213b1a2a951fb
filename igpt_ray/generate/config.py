"""Settings of batch inference and of completions."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from igpt_ray.data.config import Columns, Layout
from igpt_ray.settings import Count, OptionalUri, PoolConfig, Section, Uri


class BatchConfig(Section):
    """Images and a model: the settings that scoring and completing share."""

    release: OptionalUri = ""
    """URI of a release; or set --endpoint."""
    endpoint: str = ""
    """URL of a running server instead of a release, http://host:8000. IGPT_KEY in the environment holds its key."""
    model: str = ""
    """Name of the server's model; empty for its first."""
    tokens: OptionalUri = ""
    """URI of a token store; or set --source."""
    source: OptionalUri = ""
    """URI of a folder or bucket of images instead of tokens, in any layout that `igpt prepare` reads."""
    layout: Layout | None = None
    """Layout of the images; None detects it."""
    columns: Columns = ()
    """Columns of Parquet files with unusual names, as image=NAME and label=NAME."""
    split: str | None = None
    """Split to read; None: the split test, or else the only split."""
    unit_images: Count = 1000
    """Images per unit of work and output file, for images in folders. A token store has one unit per shard."""
    pool: PoolConfig = PoolConfig()

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if bool(self.release) == bool(self.endpoint):
            raise ValueError("set exactly one of --release and --endpoint")
        if bool(self.tokens) == bool(self.source):
            raise ValueError("set exactly one of --tokens and --source")
        return self


class CompleteConfig(BatchConfig):
    """Complete the lower part of images."""

    out: Uri
    """URI of the output folder: completions.parquet and .png, or one pair per unit if all images are completed."""
    images: Annotated[int, Field(ge=0)] = 8
    """Number of images from a token store, evenly spaced over the split; 0 for all. With --source always all."""
    n: Annotated[int, Field(ge=1, le=16)] = 4
    """Completions per image."""
    rows: Annotated[int, Field(ge=0)] | None = None
    """Rows of pixels in the prompt; None for half of the image."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Divisor of the logits; 0 takes the most likely colour."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k most likely colours; 0 for all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely colours that together have this probability."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed. Each sample has its own stream of random numbers, so the batch does not influence it."""
    slots: Annotated[int, Field(ge=16)] = 32
    """Images that a worker generates at once."""
