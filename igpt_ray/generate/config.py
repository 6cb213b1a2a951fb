"""Settings of batch work on pictures, and of completing them."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from igpt_ray.data.config import Layout
from igpt_ray.settings import Count, OptionalUri, PoolConfig, Section, Uri


class BatchConfig(Section):
    """Pictures, and who is asked about them: what scoring and completing have in common."""

    release: OptionalUri = ""
    """URI of a release; or ask a server."""
    endpoint: str = ""
    """URL of a server to ask instead, http://host:8000; its key is in the environment variable IGPT_KEY."""
    model: str = ""
    """Which of the server's models; empty is its first."""
    tokens: OptionalUri = ""
    """URI of a token store; or take images."""
    source: OptionalUri = ""
    """URI of a folder or bucket of images instead, in any layout that jobs/prepare.py reads."""
    layout: Layout | None = None
    """Of those images; None recognises it."""
    split: str = "test"
    """Split to take."""
    unit_images: Count = 1000
    """Images of a unit of work, of images in folders: each becomes a file. Of a token store it is a shard."""
    pool: PoolConfig = PoolConfig()

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if bool(self.release) == bool(self.endpoint):
            raise ValueError("name who is asked: --release or --endpoint, one of them")
        if bool(self.tokens) == bool(self.source):
            raise ValueError("name the pictures: --tokens or --source, one of them")
        return self


class CompleteConfig(BatchConfig):
    """Finish the lower part of pictures."""

    out: Uri
    """URI of the folder to write: completions.parquet and .png; of all pictures, both for each unit."""
    images: Annotated[int, Field(ge=0)] = 8
    """Pictures of a token store, spread evenly over the split; 0 is all. Of --source always all."""
    n: Annotated[int, Field(ge=1, le=16)] = 4
    """Completions of each."""
    rows: Annotated[int, Field(ge=0)] | None = None
    """Rows of pixels that are given; None is half of them."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Divides the logits; 0 takes the likeliest colour."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample among the k likeliest colours; 0 is all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest colours that together have this probability."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds the samples; each has its own stream, so neighbours in a batch do not matter."""
    slots: Annotated[int, Field(ge=16)] = 32
    """Pictures that a worker paints at once."""
