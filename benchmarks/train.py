"""One training step (forward, backward, Adam) of our network and of other implementations of the same architecture.

All read the same tokens in the same precision with torch's fused Adam, and none uses dropout. "Compiled" means
torch.compile around network and loss with static shapes. `of_matmul` is the share of the FLOPs per second of torch's
matrix product at the shape of the MLP, with attention counted causally as in `igpt_ray.train.estimate`. transformers
and minGPT compute attention explicitly; the plain network and ours use `scaled_dot_product_attention`.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import in_turn, timed
from igpt_ray.errors import SettingError
from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.settings import Count, OptionalUri, Section
from igpt_ray.train.estimate import flops_per_token
from igpt_ray.train.presets import PRESETS

Report = dict[str, Any]
Loss = Callable[[Tensor], Tensor]
"""Tokens (B, T) -> mean nats per token."""
Build = Callable[[ModelConfig], tuple[nn.Module, Loss]]

SHAPES: dict[str, tuple[ModelConfig, int]] = {
    "small": (ModelConfig(n_layer=4, n_embd=128, n_head=4, n_px=16), 16),
    "layer": (ModelConfig(n_layer=1), 4),
    "igpt-s": (PRESETS["igpt-s"][1].model, 16),
    "igpt-m": (PRESETS["igpt-m"][1].model, 8),
    "igpt-l": (PRESETS["igpt-l"][1].model, 4),
}
"""Network, and images per step."""
PRODUCTS = 10
"""Matrix products per measurement of the reachable FLOPs."""


class BenchTrainConfig(Section):
    """Compare a training step with other implementations of the same architecture."""

    shapes: tuple[str, ...] = ("small", "layer")
    """Any of small (4 layers of width 128, 256 tokens), layer (one layer of iGPT-S), igpt-s, igpt-m and igpt-l."""
    rounds: Count = 15
    """Repetitions of each implementation; results are medians over them."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to run on."""
    threads: Count = 2
    """Threads of torch on the CPU."""
    mingpt: OptionalUri = ""
    """Folder with a checkout of karpathy/minGPT; empty leaves minGPT out."""


def train(settings: BenchTrainConfig) -> Report:
    """Return the speeds for each shape and precision.

    Raises `SettingError` for an unknown shape.
    """
    if unknown := set(settings.shapes) - SHAPES.keys():
        raise SettingError(f"unknown shape {unknown.pop()!r}: expected one of {', '.join(SHAPES)}")
    torch.set_num_threads(settings.threads)
    shapes = {
        f"{shape} {precision}": compare(shape, getattr(torch, precision), settings)
        for shape in settings.shapes
        for precision in ("float32", "bfloat16")
    }
    return {"device": settings.device, "threads": settings.threads, "torch": torch.__version__, "shapes": shapes}


def compare(shape: str, dtype: torch.dtype, settings: BenchTrainConfig) -> Report:
    """Speeds of all implementations at one shape and precision."""
    model, batch_size = SHAPES[shape]
    torch.compiler.reset()  # the compiler otherwise reaches its limit of recompilations per function
    torch.manual_seed(0)
    tokens = torch.randint(0, model.n_vocab, (batch_size, model.n_positions), device=settings.device)
    alternatives: dict[str, Callable[[], None]] = {}
    for name, build in networks(settings.mingpt).items():
        alternatives[name] = step_of(build, model, tokens, dtype, compiled=False)
        alternatives[f"{name} compiled"] = step_of(build, model, tokens, dtype, compiled=True)
    alternatives["matmul"] = products(model, tokens, dtype)
    medians = {
        name: float(np.median(seconds))
        for name, seconds in in_turn(alternatives, settings.rounds, settings.device).wall.items()
    }
    matmul_flops = PRODUCTS * 2 * tokens.numel() * 4 * model.n_embd**2 / medians.pop("matmul")
    flops = flops_per_token(model, causal=model.objective == "next")
    rates = {name: tokens.numel() / seconds for name, seconds in medians.items()}
    fastest_other = max(rate for name, rate in rates.items() if not name.startswith("ours"))
    return {
        "flops_per_token": flops,
        "matmul_tflops": round(matmul_flops / 1e12, 3),
        "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
        "of_matmul": {name: round(rate * flops / matmul_flops, 3) for name, rate in rates.items()},
        "ours_to_fastest_other": round(max(rates["ours"], rates["ours compiled"]) / fastest_other, 3),
    }


def step_of(build: Build, model: ModelConfig, tokens: Tensor, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    """A training step, run twice here so that compilation and first allocations are done."""
    network, loss = build(model)
    network.to(device=tokens.device, dtype=dtype)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    run = torch.compile(loss) if compiled else loss

    def step() -> None:
        run(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        timed(step, tokens.device.type)
    return step


def products(model: ModelConfig, tokens: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """The first matrix product of the MLP, `PRODUCTS` times."""
    x = torch.randn(tokens.numel(), model.n_embd, dtype=dtype, device=tokens.device)
    weight = torch.randn(4 * model.n_embd, model.n_embd, dtype=dtype, device=tokens.device)

    def multiply() -> None:
        for _ in range(PRODUCTS):
            F.linear(x, weight)

    return multiply


# ------------------------------------------------------------------------------------------------ networks


def networks(mingpt: str) -> dict[str, Build]:
    if not mingpt:
        return {"ours": ours, "plain": plain, "transformers": transformers}
    sys.path.insert(0, mingpt)
    return {"ours": ours, "plain": plain, "transformers": transformers, "minGPT": min_gpt}


def ours(model: ModelConfig) -> tuple[nn.Module, Loss]:
    network = ImageGPT(model)
    return network, lambda tokens: losses.next_pixel(network(tokens), tokens).mean()


def plain(model: ModelConfig) -> tuple[nn.Module, Loss]:
    """GPT-2 with torch's layers: layer norms, biases, scaled_dot_product_attention and GELU."""
    network = Plain(model)
    return network, lambda tokens: mean_nats(network(shifted(tokens, model)), tokens)


def transformers(model: ModelConfig) -> tuple[nn.Module, Loss]:
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    network = ImageGPTForCausalImageModeling(
        ImageGPTConfig(
            vocab_size=model.n_vocab + 1,
            n_positions=model.n_positions,
            n_embd=model.n_embd,
            n_layer=model.n_layer,
            n_head=model.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )
    return network, lambda tokens: mean_nats(network(shifted(tokens, model)).logits, tokens)


def min_gpt(model: ModelConfig) -> tuple[nn.Module, Loss]:
    from mingpt.model import GPT  # type: ignore[import-not-found]

    shape = GPT.get_default_config()
    shape.merge_from_dict(
        {
            "model_type": None,
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "n_embd": model.n_embd,
            "vocab_size": model.n_vocab + 1,
            "block_size": model.n_positions,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    )
    network: nn.Module = GPT(shape)
    return network, lambda tokens: mean_nats(network(shifted(tokens, model))[0], tokens)


def shifted(tokens: Tensor, model: ModelConfig) -> Tensor:
    """Tokens shifted right behind a start token, whose index follows the colours'. `ImageGPT` does this itself."""
    return torch.cat([torch.full_like(tokens[:, :1], model.n_vocab), tokens[:, :-1]], dim=1)


def mean_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


class Plain(nn.Module):
    def __init__(self, model: ModelConfig):
        super().__init__()
        self.wte = nn.Embedding(model.n_vocab + 1, model.n_embd)
        self.wpe = nn.Parameter(0.01 * torch.randn(model.n_positions, model.n_embd))
        self.h = nn.ModuleList(PlainBlock(model.n_embd, model.n_head) for _ in range(model.n_layer))
        self.ln_f = nn.LayerNorm(model.n_embd)
        self.head = nn.Linear(model.n_embd, model.n_vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.wte(tokens) + self.wpe
        for block in self.h:
            h = block(h)
        return self.head(self.ln_f(h))


class PlainBlock(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv, self.proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (self.n_head, -1)).transpose(1, 2) for x in self.qkv(self.ln_1(h)).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.proj(y.transpose(1, 2).flatten(2))
        return h + self.mlp(self.ln_2(h))
