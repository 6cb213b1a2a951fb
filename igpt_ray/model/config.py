"""Settings of the network."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from igpt_ray.settings import Count, Section


class ModelConfig(Section):
    """The network (paper, section 2; OpenAI's `src/model.py`)."""

    n_layer: Count = 24
    """Blocks."""
    n_embd: Count = 512
    """Width."""
    n_head: Count = 8
    """Attention heads; must divide the width."""
    n_px: Count = 32
    """Pixels a side; the sequence has n_px * n_px positions."""
    n_vocab: Annotated[int, Field(ge=2, le=65536)] = 512
    """Colours in the palette."""
    objective: Literal["next", "masked"] = "next"
    """Predict the next pixel, or masked pixels as in BERT, without start vector and causal mask."""
    n_class: Annotated[int, Field(ge=0)] = 0
    """Classes of the classification head; 0 for no head."""
    qk_norm: bool = False
    """Not in the paper: RMS norms with gains on the queries and keys of each head."""
    rotary: bool = False
    """Not in the paper: rotary embeddings of row and column, in addition to the learned positions."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.rotary and self.head_width % 4:
            raise ValueError(f"rotary needs a head width that is a multiple of 4; n_embd / n_head is {self.head_width}")
        return self

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def modern(self) -> list[str]:
        """The enabled settings that neither the paper nor transformers has."""
        return [name for name in ("qk_norm", "rotary") if getattr(self, name)]

    @property
    def n_positions(self) -> int:
        return self.n_px * self.n_px

    @property
    def n_params(self) -> int:
        d, n = self.n_embd, self.n_positions
        sos = d if self.objective == "next" else 0
        gains = 2 * d + (2 * self.head_width if self.qk_norm else 0)
        return self.n_layer * (12 * d * d + gains) + n * d + 2 * self.n_vocab * d + d + sos + self.n_class * d
