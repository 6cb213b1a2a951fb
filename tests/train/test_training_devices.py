"""Training by the loop on the CPU and on CUDA: against a plain float64 loop, compiled, in bfloat16, and resumed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt_ray.data.loader import SplitCache, global_batch
from igpt_ray.data.token_store import TokenStore
from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train import checkpoint, loop, metrics, optim
from igpt_ray.train.batches import sample_masks
from igpt_ray.train.config import PretrainConfig
from tests.train.test_loop import settings_for, weights_of

pytestmark = pytest.mark.usefixtures("process_group")

MODERN: dict[str, Any] = {
    "model": {"qk_norm": True, "rotary": True, "n_embd": 64},
    "optim": {"muon_lr": 0.02, "lr": 3e-3, "clip": 1.0},
}
RECIPES: dict[str, dict[str, Any]] = {
    "next": {"model": {"n_embd": 128}},
    "masked": {"model": {"n_embd": 128, "objective": "masked"}},
    "modern": MODERN,
}


def settings(store: TokenStore, folder: Path, name: str, recipe: str, **workers: Any) -> PretrainConfig:
    """Twelve steps of five images in micro-batches of two, with the loss of every step in the metrics."""
    changes = {section: dict(change) for section, change in RECIPES[recipe].items()}
    changes["workers"] = {"precision": "float32", "compile": False, "micro_batch": 2} | workers
    changes["run"] = {"log_every": 1}
    return settings_for(store, folder, name, **changes)


def trained(cfg: PretrainConfig, device: torch.device) -> list[float]:
    """Loss of every step."""
    loop.train(cfg, device)
    return [line["nats_per_token"] for line in metrics.read(cfg.run.uri)]


def plainly_trained(cfg: PretrainConfig, store: TokenStore) -> list[float]:
    """The same steps in float64 on the CPU, without sharding, micro-batches and files."""
    torch.manual_seed(cfg.seed)
    model = ImageGPT(cfg.model).double()
    optimizer = optim.build(model, cfg.optim)
    images, curve = SplitCache(store, cfg.data.split), []
    for step in range(cfg.optim.steps):
        batch = global_batch(cfg.seed, step, cfg.optim.batch_size, len(images))
        x = torch.from_numpy(images[batch].astype(np.int64))
        mask = sample_masks(cfg.seed, batch, x.shape[1]) if cfg.model.objective == "masked" else None
        loss = losses.generative(model, x, mask) / (x.numel() if mask is None else len(x))
        optimizer.zero_grad()
        loss.backward()
        if cfg.optim.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip)
        optim.set_lr(optimizer, optim.lr_at(step, cfg.optim))
        optimizer.step()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_equal_those_of_a_plain_float64_loop(
    device: torch.device, store: TokenStore, tmp_path: Path, recipe: str
) -> None:
    """Micro-batches, sharding, clipping and the optimiser of the device change no loss."""
    cfg = settings(store, tmp_path, "run", recipe)
    curve = trained(cfg, device)
    assert len(curve) == cfg.optim.steps
    assert curve == pytest.approx(plainly_trained(cfg, store), abs=1e-3)
    assert max(curve) - min(curve) > 0.1  # the weights have changed


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_losses_are_near_those_of_float32(
    device: torch.device, store: TokenStore, tmp_path: Path, recipe: str
) -> None:
    exact = trained(settings(store, tmp_path, "exact", recipe), device)
    curve = trained(settings(store, tmp_path, "bfloat16", recipe, precision="bfloat16"), device)
    assert curve == pytest.approx(exact, rel=2e-2)
    assert curve != exact


@pytest.mark.parametrize(
    ("recipe", "precision"), [("next", "float32"), ("next", "bfloat16"), ("masked", "bfloat16"), ("modern", "bfloat16")]
)
def test_a_resumed_run_has_the_same_bits(
    device: torch.device, store: TokenStore, tmp_path: Path, recipe: str, precision: str
) -> None:
    """Checkpoints hold the exact weights and moments of the device, and kernels sum in the same order again."""
    cfg = settings(store, tmp_path, "run", recipe, precision=precision)
    curve, bits = trained(cfg, device), weights_of(cfg.run.uri)
    checkpoint.rewind(cfg.run.uri, 4)
    assert trained(cfg, device) == curve
    assert weights_of(cfg.run.uri) == bits


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "precision"), [("next", "float32"), ("modern", "bfloat16")])
def test_compiled_losses_equal_eager_ones(
    device: torch.device, store: TokenStore, tmp_path: Path, recipe: str, precision: str
) -> None:
    """Compiled code rounds less often to bfloat16."""
    eager = trained(settings(store, tmp_path, "eager", recipe, precision=precision), device)
    compiled = trained(settings(store, tmp_path, "compiled", recipe, precision=precision, compile=True), device)
    assert compiled == pytest.approx(eager, rel=1e-4 if precision == "float32" else 2e-2)


@pytest.mark.parametrize("activation_checkpointing", ["selective", "full"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activation_checkpointing_gives_the_same_losses(
    device: torch.device, store: TokenStore, tmp_path: Path, precision: str, activation_checkpointing: str
) -> None:
    """Selective checkpointing keeps the outputs of each device's attention operators."""
    plain = trained(settings(store, tmp_path, "plain", "next", precision=precision), device)
    how = {"precision": precision, "activation_checkpointing": activation_checkpointing}
    assert trained(settings(store, tmp_path, "again", "next", **how), device) == pytest.approx(plain, rel=1e-5)
