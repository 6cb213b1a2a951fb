"""Estimates agree with torch's own counts and with calculations by hand."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT, outline
from igpt_ray.settings import Section
from igpt_ray.train import estimate, monitor, optim, parallelize
from igpt_ray.train.config import ClusterConfig, EstimateConfig, OptimConfig, PretrainConfig, RunConfig, WorkersConfig
from igpt_ray.train.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    ModelConfig(n_layer=3, n_embd=64, n_head=2, n_px=6, n_vocab=40),
    ModelConfig(n_layer=1, n_embd=96, n_head=3, n_px=9),
]


def of(preset: str, **sections: Section) -> EstimateConfig:
    chosen = PRESETS[preset][1]
    return EstimateConfig(**{name: getattr(chosen, name) for name in PretrainConfig.model_fields} | sections)


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


class FusedNorm(torch.autograd.Function):
    """Shapes of torch's `_fused_rms_norm` on CUDA, which saves its input, the gain and one float32 number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32), gain)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(grad), torch.empty_like(ctx.saved_tensors[2])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that exist, without those of `model`, and their maximum."""

    def __init__(self, model: ImageGPT):
        super().__init__()
        self.sizes = {p.untyped_storage()._cdata: 0 for p in model.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["igpt-s", "igpt-m", "igpt-l", "igpt-s-modern", "igpt-l-modern"])
def test_activation_memory_on_a_gpu_is_that_of_the_live_tensors(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted on tensors without memory, with the norm and the attention that torch uses on CUDA.

    A model that saves other tensors changes the numbers in the docstrings of SAVED_WIDTHS and MODERN_WIDTHS.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, gain, eps: FusedNorm.apply(x, gain))
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, is_causal: flash(q, k, v, is_causal=is_causal)[0]
    )
    model, images = PRESETS[name][1].model, 4
    network = outline(model).to(dtype)
    tokens = torch.empty(images, model.n_positions, dtype=torch.int64, device="meta")
    with LiveBytes(network) as live:
        loss = losses.next_pixel(network(tokens), tokens).sum()
        saved = live.now
        loss.backward()
    expected = estimate.activation_bytes(model, images, dtype.itemsize)
    widths = (saved / (images * model.n_positions) - model.n_vocab * 8) / (model.n_embd * dtype.itemsize)
    assert saved == pytest.approx(expected, rel=0.01), f"a block saves {widths / model.n_layer:.1f} widths"
    assert live.peak == pytest.approx(expected, rel=0.03)  # of the backward pass, whose gradients replace activations


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: allocated memory is not compared")
@pytest.mark.parametrize("name", ["igpt-s", "igpt-s-modern"])
def test_activation_memory_on_a_gpu_is_the_allocated_memory(name: str) -> None:
    model, images = PRESETS[name][1].model, 8
    network = ImageGPT(model).to("cuda", torch.bfloat16)
    tokens = torch.zeros(images, model.n_positions, dtype=torch.int64, device="cuda")
    losses.next_pixel(network(tokens), tokens).sum().backward()  # allocates workspaces
    network.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    losses.next_pixel(network(tokens), tokens).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(estimate.activation_bytes(model, images, 2), rel=0.05)


def test_igpt_l_on_64_h200s_by_hand() -> None:
    settings = of("igpt-l", workers=WorkersConfig(n=64), cluster=ClusterConfig(mfu=0.5, price=4))
    found = estimate.estimate(settings)
    step = 128 * 1024 * 8_611_430_400 / (64 * 989e12 * 0.5)
    assert found.step_seconds == pytest.approx(step)
    assert found.hours == pytest.approx(1e6 * step / 3600, abs=0.01)
    assert found.dollars == pytest.approx(1e6 * step / 3600 * 64 * 4, rel=1e-4)
    assert found.memory_gb["weights_gradients_adam"] == round(16 * 1_362_250_752 / 64 / 1e9, 3)
    assert found.traffic_gb_per_step == round(63 / 64 * 1_362_250_752 * (2 + 2 + 4) / 1e9, 3)
    assert found.fits


def test_insufficient_memory_and_a_network_bottleneck_are_reported() -> None:
    alone = of("igpt-xl", workers=WorkersConfig(micro_batch=64))
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
    assert (one.passes_per_step, four.passes_per_step) == (8, 2)
    (p, sharded), unsharded = (one.n_params, 12 * one.n_params / 4), 4 * one.n_params
    assert one.memory_gb["weights_gradients_adam"] == pytest.approx(16 * p / 1e9, abs=0.001)
    assert four.memory_gb["weights_gradients_adam"] == pytest.approx((sharded + unsharded) / 1e9, abs=0.001)


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
    workers = WorkersConfig(n=4, activation_checkpointing=activation_checkpointing)
    settings, memory = of("igpt-l", workers=workers), 141e9

    def needed(images: int, passes: int) -> float:
        return sum(estimate.memory_bytes(settings, images, passes).values())

    n = estimate.images_that_fit(settings, share=10**6, memory=memory)
    assert needed(n, 2) <= 0.9 * memory < needed(n + 1, 2)
    assert estimate.images_that_fit(settings, share=3, memory=memory) == 3
    assert estimate.images_that_fit(settings, share=3, memory=1e9) == 1  # out of memory otherwise
    only_one_pass = (needed(n, 1) + needed(n, 2)) / 2 / 0.9  # memory without unsharded gradients, not with them
    assert estimate.images_that_fit(settings, share=n, memory=only_one_pass) == n
    assert estimate.images_that_fit(settings, share=2 * n, memory=only_one_pass) < n
    found = estimate.estimate(settings)
    assert (found.images_per_pass, found.passes_per_step) == (32, 1)
    assert found.fits


def test_activation_checkpointing_trades_compute_for_memory() -> None:
    plain, again, selective = (
        estimate.estimate(of("igpt-l", workers=WorkersConfig(n=8, activation_checkpointing=how)))
        for how in ("none", "full", "selective")
    )
    assert selective.step_seconds == plain.step_seconds
    assert selective.memory_gb["activations"] < 0.75 * plain.memory_gb["activations"]
    assert again.step_seconds == pytest.approx(plain.step_seconds * 4 / 3)
    assert again.memory_gb["activations"] < plain.memory_gb["activations"] / 10


def test_samples_need_the_network_and_a_cache_on_worker_0() -> None:
    """They are drawn between the steps, so their memory and that of the activations are not added."""
    assert monitor.PICTURES * monitor.COMPLETIONS == estimate.SAMPLES
    run, p = RunConfig(sample_every=100), 1_362_250_752
    small, large = (estimate.estimate(of("igpt-l", run=run, workers=WorkersConfig(n=128, micro_batch=1)))
                    for run in (RunConfig(), run))  # fmt: skip
    cache = 2 * 24 * 48 * 1024 * 1536
    assert (small.memory_gb["samples"], large.memory_gb["samples"]) == (0, round(2 * (p + cache) / 1e9, 3))
    expected = large.memory_gb["weights_gradients_adam"] + large.memory_gb["samples"]
    assert large.memory_gb_total == pytest.approx(expected, abs=0.002)
    assert "  samples" in "\n".join(estimate.lines(of("igpt-l", run=run), large))


def test_an_estimate_is_for_gpus_and_their_defaults() -> None:
    workers = of("igpt-s").workers
    assert (workers.precision, workers.compile, workers.micro_batch) == ("bfloat16", True, "auto")
    assert EstimateConfig().workers.precision == "bfloat16"
    assert of("igpt-s", workers=WorkersConfig(precision="float32")).workers.precision == "float32"


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
