"""Sharding changes the placement of weights, and no result."""

import gc
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import random_model, random_tokens
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from igpt_ray.model import losses as objectives
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train import estimate, optim, parallelize
from igpt_ray.train.config import OptimConfig, WorkersConfig
from igpt_ray.train.presets import PRESETS
from igpt_ray.train.torch_compat import fake_store

MODERN = {"qk_norm": True, "rotary": True}
MUON = OptimConfig(lr=1e-2, muon_lr=0.02)


@pytest.fixture
def mesh(device: torch.device, process_group: None) -> DeviceMesh:
    return init_device_mesh(device.type, (1,))


def pair(mesh: DeviceMesh, precision: str = "float32") -> tuple[ImageGPT, ImageGPT]:
    """A network, plain and sharded."""
    plain, sharded = (random_model(std=0.15, device=mesh.device_type).requires_grad_(True).train() for _ in range(2))
    return plain, parallelize.shard(sharded, mesh, WorkersConfig(precision=precision))


def both(plain: ImageGPT, sharded: ImageGPT, of: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for (name, p), (other, q) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
        assert name == other
        assert isinstance(q, DTensor)
        a, b = (p, q) if of == "weight" else (p.grad, q.grad)
        assert a is not None
        assert isinstance(b, DTensor)
        yield name, a.detach(), b.full_tensor().detach()


def test_a_sharded_network_has_the_same_loss_gradients_and_step(mesh: DeviceMesh) -> None:
    """Each block is sharded once, and the reduction divides once."""
    plain, sharded = pair(mesh)
    x = random_tokens(plain, 4)
    losses = []
    for model in (plain, sharded):
        loss = objectives.next_pixel(model(x), x).mean()
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for name, a, b in both(plain, sharded, "grad"):
        torch.testing.assert_close(b, a, **close(a), msg=name)
    for model in (plain, sharded):
        optim.build(model, OptimConfig(lr=1e-2)).step()
    for name, a, b in both(plain, sharded, "weight"):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6 if mesh.device_type == "cpu" else 1e-4, msg=name)


def close(expected: torch.Tensor) -> dict[str, float]:
    """Tolerances of gradients. On CUDA some kernels sum in another order in every call."""
    if expected.is_cuda:
        return {"rtol": 1e-4, "atol": 1e-5 * float(expected.abs().max())}
    return {"rtol": 1e-5, "atol": 1e-7}


def test_a_sharded_network_fine_tunes(device: torch.device, mesh: DeviceMesh) -> None:
    """`forward_with_classifier` must be registered, or its weights would not be gathered."""
    plain, sharded = (random_model(std=0.15, n_class=3, device=device).requires_grad_(True).train() for _ in range(2))
    sharded = parallelize.shard(sharded, mesh, WorkersConfig())
    x, labels = random_tokens(plain, 4), torch.tensor([0, 1, 2, 0], device=device)
    for model in (plain, sharded):
        objectives.loss_parts(model, x, labels)[0].mean().backward()
    for name, a, b in both(plain, sharded, "grad"):
        torch.testing.assert_close(b, a, **close(a), msg=name)


def test_every_block_and_the_rest_are_sharded_separately(mesh: DeviceMesh) -> None:
    """Otherwise all weights would be gathered at once."""
    _, sharded = pair(mesh)
    units = [name for name, module in sharded.named_modules() if isinstance(module, FSDPModule)]
    assert units == ["", "h.0", "h.1", "h.2"]


def test_gradients_accumulate_before_they_are_reduced(mesh: DeviceMesh) -> None:
    """Gradients are reduced once, after the last micro-batch."""
    plain, sharded = pair(mesh)
    x = random_tokens(plain, 6)
    (objectives.next_pixel(plain(x), x).sum() / x.numel()).backward()
    parts = x.split(2)
    for i, part in enumerate(parts):
        parallelize.reduce_gradients(sharded, now=i == len(parts) - 1)
        (objectives.next_pixel(sharded(part), part).sum() / x.numel()).backward()
    for name, a, b in both(plain, sharded, "grad"):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=name)


def test_master_weights_are_float32(mesh: DeviceMesh) -> None:
    """In bfloat16, updates smaller than 1/256 of the weight would be lost."""
    plain, sharded = pair(mesh, "bfloat16")
    x = random_tokens(plain, 4)
    logits = sharded(x)
    assert logits.dtype == torch.bfloat16
    loss = objectives.next_pixel(logits, x).mean()
    loss.backward()
    expected = objectives.next_pixel(plain(x), x).mean()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    assert loss.dtype == torch.float32
    assert {p.dtype for p in sharded.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in sharded.parameters() if p.grad is not None} == {torch.float32}


# ------------------------------------------------------------------------------------------------ the modern recipe


def train(model: ImageGPT, rank: int, world_size: int) -> list[float]:
    """Losses of 24 steps on this worker's part of 12 images; their mean over workers is the loss of the batch."""
    optimizer, losses = optim.build(model, MUON), []
    for step in range(24):
        x = random_tokens(model, 12, seed=step).chunk(world_size)[rank]
        loss = objectives.next_pixel(model(x), x).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fresh() -> ImageGPT:
    return random_model(std=0.15, n_layer=2, **MODERN).requires_grad_(True).train()


def worker(rank: int, world_size: int, folder: str, fsdp_size: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    model = parallelize.shard(fresh(), parallelize.mesh_of("cpu", fsdp_size), WorkersConfig())
    assert {cast(DTensor, p).device_mesh.shape for p in model.parameters()} == {(2, 2) if fsdp_size else (world_size,)}
    losses = train(model, rank, world_size)
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    torch.save((losses, weights), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "fsdp_size"), [(2, None), (3, None), (4, 2)])
def test_muon_takes_the_same_steps_on_any_number_of_workers(world_size: int, fsdp_size: int, tmp_path: Path) -> None:
    """Matrices are orthogonalised as a whole. Rows or layers need not divide evenly, as with three workers. Replicas
    stay identical, as with two of two."""
    torch.multiprocessing.spawn(worker, (world_size, str(tmp_path), fsdp_size), nprocs=world_size)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    plain = fresh()
    losses = torch.tensor([losses for losses, _ in found]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(train(plain, 0, 1)), rtol=0, atol=1e-5)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(found[0][1][name], p.detach(), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)  # on CUDA another compiler is used
def test_blocks_run_uncompiled_with_a_warning_where_the_compiler_does_not_work(
    device: torch.device,
    mesh: DeviceMesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # without the results of a compiler
    torch.compiler.reset()
    model = random_model()
    x = random_tokens(model, 2)
    expected = model(x)
    sharded = parallelize.shard(model, mesh, WorkersConfig(compile=True))
    torch.testing.assert_close(sharded(x), expected)
    (record,) = (record for record in caplog.records if record.name == parallelize.__name__)
    assert "torch.compile does not work here" in record.message
    assert "no-such-compiler" in record.message


# ------------------------------------------------------------------------------------------------ large meshes


def _accumulated_bytes(model: ModelConfig, n: int, passes: int) -> int:
    """Bytes that exist after the backward passes of one of n workers, and did not before."""
    dist.init_process_group("fake", store=fake_store(), rank=0, world_size=n)
    workers = WorkersConfig(n=n, precision="bfloat16")
    network = parallelize.shard(ImageGPT(model), parallelize.mesh_of("cpu", None), workers)
    tokens = torch.zeros(1, model.n_positions, dtype=torch.int64)

    def storages() -> dict[int, int]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.device.type == "cpu"]
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}

    before = storages()
    for i in range(passes):
        parallelize.reduce_gradients(network, i == 1)
        objectives.next_pixel(network(tokens), tokens).sum().backward()
    return sum(size for pointer, size in storages().items() if pointer not in before)


@pytest.mark.parametrize("passes", [1, 2])
def test_accumulated_gradients_are_unsharded_float32(passes: int) -> None:
    """They are reduced in the last pass. `estimate.state_bytes` counts them."""
    model, n = ModelConfig(n_layer=3, n_embd=64, n_head=2, n_px=8, n_vocab=40), 4
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one:
        measured = one.submit(_accumulated_bytes, model, n, passes).result()
    unsharded, sharded = 4 * model.n_params, 4 * model.n_params / n
    assert measured == pytest.approx(unsharded if passes == 1 else sharded, rel=0.1)
    extra = [estimate.state_bytes(model, OptimConfig(), n, passes) for passes in (1, 2)]
    assert extra[1] - extra[0] == unsharded - sharded


def test_a_mesh_has_replicas_only_if_configured(process_group: None) -> None:
    assert parallelize.mesh_of("cpu", None).shape == (1,)
    assert parallelize.mesh_of("cpu", 8).shape == (1,)  # elastic runs may be down to fewer workers than share a copy


@pytest.mark.parametrize(("n", "fsdp_size"), [(1024, None), (1024, 64), (24, None), (24, 8)])
def test_a_large_mesh_runs_in_one_process(n: int, fsdp_size: int) -> None:
    """8 and 64 divide every matrix of iGPT-XL; with other numbers some workers have less."""
    model = PRESETS["igpt-xl"][1].model
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one:  # this process has its own group
        fewest, most = one.submit(parallelize.sharding_dry_run, model, WorkersConfig(n=n, shard=fsdp_size)).result()
    even = model.n_params / (fsdp_size or n)
    assert fewest <= even <= most
    assert (fewest == even == most) == (fsdp_size in (8, 64))
    assert most < 1.1 * even
