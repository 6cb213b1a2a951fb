"""Settings of conversion between formats of weights."""

from typing import Literal

from igpt_ray.data.config import PaletteUri
from igpt_ray.settings import Section, Uri


class ConvertConfig(Section):
    """Carry weights from one format to another: OpenAI's, transformers', and our releases."""

    source: Uri
    """URI of a release, of a folder of transformers, or of OpenAI's checkpoint without `.index`."""
    out: Uri
    """URI of the folder to write."""
    to: Literal["release", "transformers"] = "release"
    """Format to write."""
    palette: PaletteUri | None = None
    """URI of the palette (.npy), or the word openai; None: what the source holds (OpenAI's checkpoints hold none)."""
    pipeline: Literal["fast", "reference"] = "reference"
    """Pixel pipeline to give a release. The one behind foreign weights was never published; this is what images will
    be prepared with."""
