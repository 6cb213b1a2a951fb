"""ImageGPT: the network of "Generative Pretraining from Pixels", after OpenAI's `src/model.py`.

`train/parallelize.py` adds parallelism, precision and compilation; `generate/kv_cache.py` holds the KV cache.

    B batch   T positions, n_px * n_px in raster order   C width   N heads   D = C / N   V colours   L layers
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_ray.model.config import ModelConfig
from igpt_ray.model.quick_gelu import quick_gelu

NORM_EPS = 1e-5
CPU_FLOAT32_ELEMENTS = 8192
"""Positions times head width up to which attention on a CPU is faster in float32 than in bfloat16, casts included.
torch 2.13's bfloat16 kernel takes 1.3 times as long at 128 x 64 and 2.4 times at 128 x 32, but 0.7 at 256 x 64."""
CPU_QUERY_BLOCKS = 4
"""Blocks that the queries of such a causal attention are split into."""
ROTARY_BASE = 100.0
"""The highest frequency is 1 radian per pixel, the lowest about 0.01: images are at most 64 pixels wide."""


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention: queries, keys and values to outputs, each (B, N, T, D)."""


def mean_over_positions(h: Tensor) -> Tensor:
    """The paper's pooling: (B, T, C) -> (B, C), summed in float32."""
    return h.mean(1, dtype=torch.float32)


class ImageGPT(nn.Module):
    """Predicts each pixel from the pixels before it, or, with the objective `masked`, masked pixels from all others.

    Position t sees sos, x_0 .. x_{t-1} and predicts x_t: the first pixel is predicted from the learned start vector
    `sos` alone, and the last is never an input. Input and output embeddings are separate (`wte`, `wtet`).

    The masked objective has no start vector and no shift. Where `visible_mask` (B, T) is False, the token embedding is
    zero and only the position embedding remains; there is no mask token. Attention is bidirectional.
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

    def forward(self, tokens: Tensor, visible_mask: Tensor | None = None) -> Tensor:
        """Logits of every position: (B, T) -> (B, T, V). They do not depend on token t, unless it is visible."""
        return self.wtet(self.hidden(tokens, visible_mask))  # (B, T, V)

    def forward_with_classifier(self, tokens: Tensor, visible_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of every position and of the classes: (B, T) -> (B, T, V), (B, classes). For fine-tuning.

        The input of the classification head is the mean over positions of the input of `wtet` (paper, section 2.3).
        """
        h = self.hidden(tokens, visible_mask)
        return self.wtet(h), self.wclf(h.mean(1))

    def hidden(self, tokens: Tensor, visible_mask: Tensor | None = None) -> Tensor:
        """The output of the last norm: (B, T) -> (B, T, C)."""
        h = self.embed(tokens, visible_mask)
        rope = self.rotation(tokens.shape[1])
        for block in self.h:
            h = block(h, rope)
        return self.ln_f(h)

    def embed(self, tokens: Tensor, visible_mask: Tensor | None = None) -> Tensor:
        """Input embeddings (B, T) -> (B, T, C): shifted right after the start vector, or masked; positions added."""
        B, T = tokens.shape
        if self.causal:
            assert visible_mask is None, "visible_mask is only for the objective masked"
            sos = self.sos.expand(B, 1, -1)
            return torch.cat([sos, self.wte(tokens[:, :-1])], dim=1) + self.wpe[:T]
        h = self.wte(tokens)
        if visible_mask is not None:
            h = h * visible_mask[..., None]
        return h + self.wpe[:T]

    def features(
        self,
        tokens: Tensor,
        last: int | None = None,
        visible_mask: Tensor | None = None,
        pool: Callable[[Tensor], Tensor] = mean_over_positions,
    ) -> Tensor:
        """The paper's features (section 3.4): (B, T) -> (B, last + 1, C).

        The output of each block's ln_1, and of ln_f for layer L, pooled over positions. The computation ends at layer
        `last` (default L).
        """
        last = len(self.h) if last is None else last
        h = self.embed(tokens, visible_mask)
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
        """Cosines and sines of the rotary embedding of the first n positions, (2, n, D / 2); None without rotary.

        The first half of the pairs encodes the row, the second the column. Computed at each call, because a buffer
        would have to be sharded, cast and stored.
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
        """OpenAI's initialisation. The output layers are zero, so the first losses are exactly ln V and ln n_class."""
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


def outline(config: ModelConfig) -> ImageGPT:
    """A network on the meta device: names and shapes without memory, which `to_empty` or `assign=True` adds."""
    with torch.device("meta"):
        return ImageGPT(config)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the MLP. The RMS norms have a gain and no bias."""

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
    """Self-attention, causal or bidirectional. `c_attn` holds OpenAI's q, k and v projections in this order."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.n_embd, config.head_width
        self.n_head = config.n_head
        self.causal = config.objective == "next"
        self.c_attn = nn.Linear(C, 3 * C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(D, NORM_EPS) if config.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """`rope`: rotary embedding. `attend` replaces the attention, for example by one with a KV cache."""
        B, T, C = x.shape
        qkv = self.c_attn(x).chunk(3, dim=2)  # whose backward pass is one copy, into the layout that c_attn needs
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in qkv)  # each (B, N, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        y = attend(q, k, v) if attend is not None else sdpa(q, k, v, causal=self.causal)  # (B, N, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention of (B, N, T, D).

    On CUDA, torch chooses among its kernels: cuDNN before flash on Hopper and Blackwell (torch 2.11 to 2.13 with cuDNN
    above 9.15), flash otherwise. `torch.backends.cuda.enable_cudnn_sdp(False)` excludes cuDNN.

    On a CPU, short bfloat16 sequences are computed in float32, see CPU_FLOAT32_ELEMENTS. Causal queries are then split
    into CPU_QUERY_BLOCKS blocks, each with the keys up to its end, because the kernel also computes masked products.
    """
    T = q.shape[2]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not 1 < T <= CPU_FLOAT32_ELEMENTS // q.shape[3]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    q, k, v, dtype = q.float(), k.float(), v.float(), q.dtype
    if not causal or T % CPU_QUERY_BLOCKS:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).to(dtype)
    n, parts = T // CPU_QUERY_BLOCKS, []
    for start in range(0, T, n):
        seen = torch.ones(n, start + n, dtype=torch.bool).tril(start)
        rows, end = slice(start, start + n), start + n
        parts.append(F.scaled_dot_product_attention(q[:, :, rows], k[:, :, :end], v[:, :, :end], attn_mask=seen))
    return torch.cat(parts, dim=2).to(dtype)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of (B, N, T, D): elements i and i + D/2 are rotated by the position's angle.

    The product of a query and a key then depends on their relative position.
    """
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class MLP(nn.Module):
    """C -> 4C -> C with OpenAI's GELU, x * sigmoid(1.702 x)."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(quick_gelu(self.c_fc(x)))
