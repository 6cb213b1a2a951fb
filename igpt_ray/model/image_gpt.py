"""ImageGPT: the network of "Generative Pretraining from Pixels", after OpenAI's `src/model.py`.

Parallelism, precision and compilation are applied from outside (`parallelize.py`); the KV cache is in `kv_cache.py`.

    B batch   T positions, n_px * n_px in raster order   C width   N heads   D = C / N   V colours   L layers
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_ray.model.config import ModelConfig

NORM_EPS = 1e-5
SHORT = 8192
"""Positions times head width up to which a CPU attends faster in float32 than in bfloat16, casts included: torch 2.13's
kernel for bfloat16 takes 1.3 times as long at 128 x 64 and 2.4 times at 128 x 32, but 0.7 at 256 x 64."""
PARTS = 4
"""Of the queries of a short causal attention."""
ROTARY_BASE = 100.0
"""The fastest pair turns by a radian a pixel, the slowest by about a hundredth: pictures are at most 64 pixels wide."""


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values to what is seen: each (B, N, T, D)."""


def mean_over_positions(h: Tensor) -> Tensor:
    """(B, T, C) -> (B, C), in float32 whatever the network computes in: the paper's pooling."""
    return h.mean(1, dtype=torch.float32)


class ImageGPT(nn.Module):
    """Predicts each pixel from those before it, or (`objective` masked) the masked ones from all others.

    Position t sees sos, x_0 .. x_{t-1} and predicts x_t: the first pixel is predicted from the learned start vector
    `sos` alone, and the last is never an input. Input and output embeddings are separate (`wte`, `wtet`).

    A masked network has no start vector and no shift. Where `keep` (B, T) is False, a position's content embedding is
    zero, so that it sees of itself only where it stands; there is no mask token. Attention looks both ways.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.n_vocab, config.n_embd)
        self.wpe = nn.Parameter(torch.empty(config.n_positions, config.n_embd))
        self.causal = config.objective == "next"
        if self.causal:
            self.sos = nn.Parameter(torch.empty(config.n_embd))
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.wtet = nn.Linear(config.n_embd, config.n_vocab, bias=False)
        if config.n_class:
            self.wclf = nn.Linear(config.n_embd, config.n_class, bias=False)
        self.init_weights()

    @property
    def blocks(self) -> list["Block"]:
        return cast("list[Block]", list(self.h))

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits of every position: (B, T) -> (B, T, V). Position t does not see token t, unless a mask keeps it."""
        return self.wtet(self.hidden(tokens, keep))  # (B, T, V)

    def forward_with_classifier(self, tokens: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of every position, and of the classes: (B, T) -> (B, T, V), (B, classes). For fine-tuning.

        The head looks at the mean over positions of what `wtet` looks at (paper, section 2.3).
        """
        h = self.hidden(tokens, keep)
        return self.wtet(h), self.wclf(h.mean(1))

    def hidden(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """The output of the last norm: (B, T) -> (B, T, C)."""
        h = self.embed(tokens, keep)
        rope = self.rotation(tokens.shape[1])
        for block in self.h:
            h = block(h, rope)
        return self.ln_f(h)

    def embed(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, C): shifted right by the start vector, or masked by `keep`; positions added."""
        B, T = tokens.shape
        if self.causal:
            assert keep is None, "a mask for a network that predicts the next pixel"
            sos = self.sos.expand(B, 1, -1)
            return torch.cat([sos, self.wte(tokens[:, :-1])], dim=1) + self.wpe[:T]
        h = self.wte(tokens)
        if keep is not None:
            h = h * keep[..., None]
        return h + self.wpe[:T]

    def features(
        self,
        tokens: Tensor,
        last: int | None = None,
        keep: Tensor | None = None,
        pool: Callable[[Tensor], Tensor] = mean_over_positions,
    ) -> Tensor:
        """The paper's features (section 3.4): (B, T) -> (B, last + 1, C), each block's ln_1 output, and ln_f's output
        at layer L, pooled over positions. Stops at layer `last` (default L)."""
        last = len(self.h) if last is None else last
        h = self.embed(tokens, keep)
        rope = self.rotation(tokens.shape[1])
        pooled = []
        for block in self.blocks[: last + 1]:
            pooled.append(pool(block.ln_1(h)))
            if len(pooled) <= last:
                h = block(h, rope)
        if last == len(self.h):
            pooled.append(pool(self.ln_f(h)))
        return torch.stack(pooled, dim=1)  # (B, last + 1, C)

    def rotation(self, n: int) -> Tensor | None:
        """Cosines and sines by which rotary positions turn heads at the first n positions: (2, n, D / 2), the first
        half of the pairs by row, the second by column; None without.

        Made anew each time: a buffer would be one more thing to shard, cast and store.
        """
        c = self.config
        if not c.rotary:
            return None
        t = torch.arange(n, device=self.wpe.device)
        pairs = c.head_width // 4
        speeds = ROTARY_BASE ** -(torch.arange(pairs, device=self.wpe.device) / pairs)  # radians per pixel
        angles = torch.cat([axis[:, None] * speeds for axis in (t // c.n_px, t % c.n_px)], dim=1)  # (n, D / 2)
        return torch.stack([angles.cos(), angles.sin()])

    @torch.no_grad()
    def init_weights(self) -> None:
        """OpenAI's initialisation. The zero heads make the first loss exactly ln V, and ln n_class."""
        C = self.config.n_embd
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe, std=0.01)
        if self.causal:
            nn.init.normal_(self.sos, std=0.02)
        nn.init.zeros_(self.wtet.weight)
        if self.config.n_class:
            nn.init.zeros_(self.wclf.weight)
        for block in self.blocks:
            nn.init.normal_(block.attn.c_attn.weight, std=C**-0.5)
            nn.init.normal_(block.attn.c_proj.weight, std=(C * self.config.n_layer) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=0.02)
            nn.init.normal_(block.mlp.c_proj.weight, std=0.02)


class Block(nn.Module):
    """Pre-norm: attention, then the MLP. The norms are RMS norms with a gain and no bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.attn = Attention(config)
        self.ln_2 = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.mlp = MLP(config.n_embd)

    def forward(self, h: Tensor, rope: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        h = h + self.attn(self.ln_1(h), rope, attend)
        return h + self.mlp(self.ln_2(h))


class Attention(nn.Module):
    """Self-attention, causal or both ways. OpenAI's q, k and v projections lie fused, in this order, in `c_attn`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.n_embd, config.head_width
        self.n_head = config.n_head
        self.causal = config.objective == "next"
        self.c_attn = nn.Linear(C, 3 * C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(D, NORM_EPS) if config.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """`rope`: rotary positions. `attend`: what attends instead, to more than the keys of x; see `slots.py`."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, N, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        y = attend(q, k, v) if attend else sdpa(q, k, v, causal=self.causal)  # (B, N, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's attention, (B, N, T, D), in the way that is fast: in float32 for what is `SHORT` on a CPU.

    Causal queries then come in `PARTS`, each with the keys up to its end: the kernel computes what a mask hides.
    """
    T = q.shape[2]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not 1 < T <= SHORT // q.shape[3]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    q, k, v, dtype = q.float(), k.float(), v.float(), q.dtype
    if not causal or T % PARTS:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).to(dtype)
    n, parts = T // PARTS, []
    for start in range(0, T, n):
        seen = torch.ones(n, start + n, dtype=torch.bool).tril(start)
        rows, end = slice(start, start + n), start + n
        parts.append(F.scaled_dot_product_attention(q[:, :, rows], k[:, :, :end], v[:, :, :end], attn_mask=seen))
    return torch.cat(parts, dim=2).to(dtype)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): element i and i + D/2 are a point in the plane, turned by an angle of the
    position: (B, N, T, D). A query and a key then agree by how far apart they stand."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class MLP(nn.Module):
    """C -> 4C -> C with OpenAI's GELU, x * sigmoid(1.702 x)."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))
