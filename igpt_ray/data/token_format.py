"""Types of tokens, without pyarrow or PIL, so that the HTTP client can import them."""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Tokens = NDArray[np.uint16]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenFormat(Strict):
    """What tokens mean. Two stores, or a store and a release, are compatible only if these fields are equal."""

    n_px: int
    n_vocab: int
    palette: str
    """Fingerprint of the palette."""
    pipeline: str
    """Name and version of the pixel pipeline."""

    @property
    def n_positions(self) -> int:
        return self.n_px * self.n_px
