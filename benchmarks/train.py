"""A training step, forward, backward and Adam, of our network and of others of the same shape, taking turns.

All see the same tokens, in the same type, with torch's fused Adam; none has dropout. Compiled means torch.compile
around network and loss, with fixed shapes. `of_matmul` is the share of what torch's own matrix product reaches at the
shape of the MLP, with attention counted causally as `estimate` does. transformers and minGPT attend explicitly, the
plain network and ours by `scaled_dot_product_attention`.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
Step = Callable[[], None]

SHAPES: dict[str, tuple[ModelConfig, int]] = {
    "small": (ModelConfig(n_layer=4, n_embd=128, n_head=4, n_px=16), 16),
    "layer": (ModelConfig(n_layer=1), 4),
    "igpt-s": (PRESETS["igpt-s"][1].model, 16),
    "igpt-m": (PRESETS["igpt-m"][1].model, 8),
    "igpt-l": (PRESETS["igpt-l"][1].model, 4),
}
"""The network, and images per step."""


class BenchTrainConfig(Section):
    """A training step beside other networks of the same shape."""

    shapes: tuple[str, ...] = ("small", "layer")
    """Of small (4 layers x 128, 256 tokens), layer (one of iGPT-S's), igpt-s, igpt-m, igpt-l."""
    rounds: Count = 15
    """How often each network takes its turn; figures are medians."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    threads: Count = 2
    """Of torch, on the CPU."""
    mingpt: OptionalUri = ""
    """A checkout of karpathy/minGPT, to have it take part."""


def train(settings: BenchTrainConfig) -> Report:
    """Raises `SettingError` for a shape that is not known."""
    if unknown := set(settings.shapes) - SHAPES.keys():
        raise SettingError(f"no shape {unknown.pop()!r}: there are {', '.join(SHAPES)}")
    torch.set_num_threads(settings.threads)
    found = {
        f"{shape} {precision}": compared(shape, getattr(torch, precision), settings)
        for shape in settings.shapes
        for precision in ("float32", "bfloat16")
    }
    return {"device": settings.device, "threads": settings.threads, "torch": torch.__version__, "shapes": found}


def compared(shape: str, dtype: torch.dtype, settings: BenchTrainConfig) -> Report:
    model, batch_size = SHAPES[shape]
    torch.compiler.reset()  # or it would give up on functions that it has compiled for too many shapes
    torch.manual_seed(0)
    tokens = torch.randint(0, model.n_vocab, (batch_size, model.n_positions), device=settings.device)
    steps: dict[str, Step] = {}
    for name, build in networks(settings.mingpt).items():
        for compiled in (False, True):
            steps[f"{name}{' compiled' if compiled else ''}"] = step_of(build, model, tokens, dtype, compiled, settings)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    ceiling: list[float] = []
    for _ in range(settings.rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, settings.device))
        ceiling.append(matmul_flops(model, tokens, dtype))
    flops = flops_per_token(model, causal=model.objective == "next")
    rates = {name: tokens.numel() / float(np.median(found)) for name, found in seconds.items()}
    others = max(rate for name, rate in rates.items() if not name.startswith("ours"))
    return {
        "flops_per_token": flops,
        "matmul_tflops": round(float(np.median(ceiling)) / 1e12, 3),
        "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
        "of_matmul": {name: round(rate * flops / float(np.median(ceiling)), 3) for name, rate in rates.items()},
        "ours_to_fastest_other": round(max(rates["ours"], rates["ours compiled"]) / others, 3),
    }


def step_of(
    build: Callable[[ModelConfig], tuple[nn.Module, Loss]],
    model: ModelConfig,
    tokens: Tensor,
    dtype: torch.dtype,
    compiled: bool,
    settings: BenchTrainConfig,
) -> Step:
    """A whole step, run twice so that all that is compiled or allocated once is there."""
    network, loss = build(model)
    network.to(device=settings.device, dtype=dtype)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    run = torch.compile(loss) if compiled else loss

    def step() -> None:
        run(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    return step


def timed(step: Step, device: str) -> float:
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_flops(model: ModelConfig, tokens: Tensor, dtype: torch.dtype) -> float:
    """FLOPs per second of the MLP's first product, alone."""
    x = torch.randn(tokens.numel(), model.n_embd, dtype=dtype, device=tokens.device)
    weight = torch.randn(4 * model.n_embd, model.n_embd, dtype=dtype, device=tokens.device)

    def products() -> None:
        for _ in range(10):
            F.linear(x, weight)

    return 10 * 2 * x.numel() * 4 * model.n_embd / timed(products, tokens.device.type)


# ------------------------------------------------------------------------------------------------ networks


Build = Callable[[ModelConfig], tuple[nn.Module, Loss]]


def networks(mingpt: str) -> dict[str, Build]:
    found: dict[str, Build] = {"ours": ours, "plain": plain, "transformers": transformers}
    if mingpt:
        sys.path.insert(0, mingpt)
        found["minGPT"] = min_gpt
    return found


def ours(model: ModelConfig) -> tuple[nn.Module, Loss]:
    network = ImageGPT(model)
    return network, lambda tokens: losses.next_pixel(network(tokens), tokens).mean()


def plain(model: ModelConfig) -> tuple[nn.Module, Loss]:
    """The GPT-2 that anyone would write today: layer norms, biases, torch's attention and GELU."""
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
    """Behind a start token, the row after the colours; ours does this inside."""
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
