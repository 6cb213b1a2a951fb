"""Settings of the conversion between weight formats."""

from typing import Literal

from igpt_ray.data.config import PaletteUri, PipelineName, ViewName
from igpt_ray.settings import Section, Uri


class ConvertConfig(Section):
    """Convert weights between OpenAI's checkpoints, transformers' folders and our releases."""

    source: Uri
    """URI of a release, of a transformers folder, or of OpenAI's checkpoint without `.index`."""
    out: Uri
    """URI of the folder to write."""
    to: Literal["release", "transformers"] = "release"
    """Format to write."""
    palette: PaletteUri | None = None
    """URI of the palette (.npy), or the word openai; None: the source's palette (OpenAI's checkpoints have none)."""
    pipeline: PipelineName = "reference"
    """Pixel pipeline that the release will use. The original pipeline of foreign weights is unpublished."""
    view: ViewName = "imagenet"
    """View that the release will use, as --pixels.view of prepare."""
