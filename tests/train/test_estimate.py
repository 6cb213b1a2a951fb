"""Estimates agree with torch's own counts and with calculations by hand."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.settings import Section
from igpt_ray.train import estimate, optim, parallelize
from igpt_ray.train.config import ClusterConfig, EstimateConfig, OptimConfig, PretrainConfig, WorkersConfig
from igpt_ray.train.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    ModelConfig(n_layer=3, n_embd=64, n_head=2, n_px=6, n_vocab=40),
    ModelConfig(n_layer=1, n_embd=96, n_head=3, n_px=9),
]

MODERN = [
    SMALL[0].model_copy(update=changes)
    for changes in ({"qk_norm": True}, {"rotary": True}, {"qk_norm": True, "rotary": True})
]


def of(preset: str, **sections: Section) -> EstimateConfig:
    chosen = PRESETS[preset][1]
    return EstimateConfig(**{name: getattr(chosen, name) for name in PretrainConfig.model_fields}).model_copy(
        update=sections
    )


@pytest.mark.parametrize("model", SMALL)
def test_flops_equal_torch_s_count(model: ModelConfig) -> None:
    """Including the head, the backward pass and all of attention."""
    tokens = torch.randint(0, model.n_vocab, (2, model.n_positions))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses.next_pixel(ImageGPT(model)(tokens), tokens).sum().backward()
    assert counter.get_total_flops() == estimate.flops_per_token(model, causal=False) * tokens.numel()


@pytest.mark.parametrize("model", SMALL)
def test_muon_s_flops_equal_torch_s_count(model: ModelConfig) -> None:
    network = ImageGPT(model)
    optimizer = optim.build(network, OptimConfig(muon_lr=0.02))
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == estimate.muon_flops(model)
    extra = [estimate.flops_per_step(model, OptimConfig(muon_lr=lr), causal=True) for lr in (0.02, None)]
    assert extra[0] - extra[1] == estimate.muon_flops(model)


def test_the_attention_of_a_masked_network_is_counted_in_full() -> None:
    """Half of it would give an unreachable time."""
    found, causal = (estimate.estimate(of(name)) for name in ("igpt-s-bert", "igpt-s"))
    assert found.flops_per_token_causal == found.flops_per_token == causal.flops_per_token
    assert found.step_seconds > causal.step_seconds
    (line,) = (line for line in estimate.lines(of("igpt-s-bert"), found) if line.startswith("  causal"))
    assert "has full attention" in line


def test_flops_and_parameters_equal_the_published_ones() -> None:
    """Training compute: S 7.9e19, L 1.2e21, XL 2.6e22 with full attention."""
    found = {name: estimate.estimate(of(name)).flops for name in ("igpt-s", "igpt-m", "igpt-l", "igpt-xl")}
    assert found == {
        "igpt-s": pytest.approx(7.9e19, rel=0.01),
        "igpt-m": pytest.approx(4.2e20, rel=0.01),
        "igpt-l": pytest.approx(1.2e21, rel=0.02),
        "igpt-xl": pytest.approx(2.6e22, rel=0.02),
    }
    assert estimate.estimate(of("igpt-s")).n_params == 76_571_648


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [*SMALL, *MODERN])
def test_activation_memory_equals_autograd_s_saved_tensors(
    model: ModelConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("igpt_ray.model.image_gpt.CPU_FLOAT32_ELEMENTS", 0)  # attend as a GPU does
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, network = 64, ImageGPT(model).to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    tokens = torch.randint(0, model.n_vocab, (images, model.n_positions))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses.next_pixel(network(tokens), tokens).sum()
    measured = sum(size for pointer, size in kept.items() if pointer not in weights)
    # The estimate also has logits and their gradient, which autograd does not save.
    expected = (
        estimate.activation_bytes(model, images, dtype.itemsize) - 2 * dtype.itemsize * tokens.numel() * model.n_vocab
    )
    assert measured == pytest.approx(expected, rel=0.02)


def test_igpt_l_on_64_h200s_by_hand() -> None:
    settings = of("igpt-l", workers=WorkersConfig(n=64, precision="bfloat16"), cluster=ClusterConfig(mfu=0.5, price=4))
    found = estimate.estimate(settings)
    step = 128 * 1024 * 8_611_430_400 / (64 * 989e12 * 0.5)
    assert found.step_seconds == pytest.approx(step)
    assert found.hours == pytest.approx(1e6 * step / 3600, abs=0.01)
    assert found.dollars == pytest.approx(1e6 * step / 3600 * 64 * 4, rel=1e-4)
    assert found.memory_gb["weights_gradients_adam"] == round(16 * 1_362_250_752 / 64 / 1e9, 3)
    assert found.traffic_gb_per_step == round(63 / 64 * 1_362_250_752 * (2 + 2 + 4) / 1e9, 3)
    assert found.fits


def test_insufficient_memory_and_a_network_bottleneck_are_reported() -> None:
    alone = of("igpt-xl", workers=WorkersConfig(precision="bfloat16", micro_batch=64))
    assert "does NOT fit" in "\n".join(estimate.lines(alone, estimate.estimate(alone)))
    slow = of("igpt-l", workers=WorkersConfig(n=128), cluster=ClusterConfig(bus_gb_per_second=5))
    found = estimate.estimate(slow)
    assert "the LIMIT" in "\n".join(estimate.lines(slow, found))
    assert found.hours == pytest.approx(1e6 * found.traffic_seconds / 3600, abs=0.01)


def test_more_workers_need_less_memory_each_and_small_micro_batches_accumulate() -> None:
    optim = OptimConfig(batch_size=120)
    one, four = (
        estimate.estimate(of("igpt-s", optim=optim, workers=WorkersConfig(n=n, micro_batch=16))) for n in (1, 4)
    )
    assert one.memory_gb["weights_gradients_adam"] == pytest.approx(
        4 * four.memory_gb["weights_gradients_adam"], abs=0.003
    )
    assert (one.passes_per_step, four.passes_per_step) == (8, 2)


@pytest.mark.parametrize("activation_checkpointing", ["selective", "full"])
def test_activation_checkpointing_memory_equals_the_live_tensors(
    process_group: None, activation_checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted over all tensors that exist between the passes."""
    model = ModelConfig(n_layer=3, n_embd=64, n_head=2, n_px=8, n_vocab=40)
    network = ImageGPT(model)
    parallelize.shard(
        network, parallelize.mesh_of("cpu", None), WorkersConfig(activation_checkpointing=activation_checkpointing)
    )
    h = torch.randn(64, model.n_positions, model.n_embd, requires_grad=True)

    def alive() -> dict[int, int]:
        gc.collect()
        found = [
            x
            for x in gc.get_objects()
            if type(x) is torch.Tensor and x.device.type == "cpu" and x.layout == torch.strided
        ]
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}

    before = alive()
    out = h
    for block in network.blocks:
        out = block(out)
    kept = sum(size for pointer, size in alive().items() if pointer not in before and size >= h.nbytes)
    widths = {"selective": estimate.PRODUCT_WIDTHS, "full": 1}[activation_checkpointing]
    assert kept == model.n_layer * widths * h.nbytes  # the last block's output in place of h
    out.sum().backward()


@pytest.mark.parametrize("activation_checkpointing", ["none", "selective", "full"])
def test_the_automatic_micro_batch_is_the_largest_that_fits(activation_checkpointing: str) -> None:
    """One image too many would run out of memory."""
    model, memory = PRESETS["igpt-l"][1].model, 141e9
    workers = WorkersConfig(n=4, precision="bfloat16", activation_checkpointing=activation_checkpointing)

    def needed(images: int) -> float:
        activations = estimate.activation_bytes(model, images, 2, activation_checkpointing)
        return estimate.state_bytes(model, OptimConfig(), 4) + estimate.gathered_bytes(model, 2) + activations

    n = estimate.images_that_fit(model, OptimConfig(), workers, share=10**6, memory=memory)
    assert needed(n) <= 0.9 * memory < needed(n + 1)
    assert estimate.images_that_fit(model, OptimConfig(), workers, share=3, memory=memory) == 3
    assert estimate.images_that_fit(model, OptimConfig(), workers, share=3, memory=1e9) == 1  # out of memory otherwise
    found = estimate.estimate(of("igpt-l", workers=workers.model_copy(update={"micro_batch": "auto"})))
    assert (found.images_per_pass, found.passes_per_step) == (
        (16, 2) if activation_checkpointing == "none" else (32, 1)
    )
    assert found.fits


def test_activation_checkpointing_trades_compute_for_memory() -> None:
    plain, again, selective = (
        estimate.estimate(of("igpt-l", workers=WorkersConfig(n=8, activation_checkpointing=how)))
        for how in ("none", "full", "selective")
    )
    assert selective.step_seconds == plain.step_seconds
    assert selective.memory_gb["activations"] < 0.55 * plain.memory_gb["activations"]
    assert again.step_seconds == pytest.approx(plain.step_seconds * 4 / 3)
    assert again.memory_gb["activations"] < plain.memory_gb["activations"] / 10


def test_a_device_is_recognised_by_cuda_s_name_for_it() -> None:
    assert estimate.peak_flops("NVIDIA H200") == 989e12
    assert estimate.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert estimate.peak_flops("Some Other Device") is None


def test_the_job_prints_a_table_and_one_json_line() -> None:
    words = ["jobs/estimate.py", "igpt-s", "--workers.n", "8", "--cluster.device", "h100"]
    said = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    *table, last = said.splitlines()
    assert any(line.startswith("memory per worker") for line in table)
    assert json.loads(last)["workers"] == 8
    assert json.loads(last).keys() == {*estimate.Estimate.model_fields, "seconds"}
