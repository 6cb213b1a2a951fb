"""Sharding changes where weights lie, and no number."""

from collections.abc import Iterator

import pytest
import torch
from conftest import random_model, random_tokens
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from igpt_ray import config, objectives, optim, parallel
from igpt_ray.model import ImageGPT


@pytest.fixture
def mesh(process_group: None) -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


def pair(mesh: DeviceMesh, precision: str = "float32") -> tuple[ImageGPT, ImageGPT]:
    """The same network, plain and sharded."""
    plain, sharded = (random_model(std=0.15).requires_grad_(True).train() for _ in range(2))
    return plain, parallel.shard(sharded, mesh, config.Workers(precision=precision))


def both(plain: ImageGPT, sharded: ImageGPT, of: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for (name, p), (other, q) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
        assert name == other
        assert isinstance(q, DTensor)
        a, b = (p, q) if of == "weight" else (p.grad, q.grad)
        assert a is not None
        assert isinstance(b, DTensor)
        yield name, a.detach(), b.full_tensor().detach()


def test_a_sharded_network_has_the_same_loss_gradients_and_step(mesh: DeviceMesh) -> None:
    """A block that is sharded twice, or not at all; a reduction that divides once too often."""
    plain, sharded = pair(mesh)
    x = random_tokens(plain, 4)
    losses = []
    for model in (plain, sharded):
        loss = objectives.next_pixel(model(x), x).mean()
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(losses[0], losses[1])
    for name, a, b in both(plain, sharded, "grad"):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8, msg=name)
    for model in (plain, sharded):
        optim.build(model, config.Optim(lr=1e-2)).step()
    for name, a, b in both(plain, sharded, "weight"):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7, msg=name)


def test_a_sharded_network_fine_tunes(mesh: DeviceMesh) -> None:
    """`joint` is not `forward`: unregistered, it would meet weights that nobody gathered."""
    plain, sharded = (random_model(std=0.15, n_class=3).requires_grad_(True).train() for _ in range(2))
    sharded = parallel.shard(sharded, mesh, config.Workers())
    x, labels = random_tokens(plain, 4), torch.tensor([0, 1, 2, 0])
    for model in (plain, sharded):
        objectives.joint(model, x, labels).mean().backward()
    for name, a, b in both(plain, sharded, "grad"):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8, msg=name)


def test_every_block_and_the_rest_are_sharded_apart(mesh: DeviceMesh) -> None:
    """A network gathered as a whole needs the memory of a whole network."""
    _, sharded = pair(mesh)
    units = [name for name, module in sharded.named_modules() if isinstance(module, FSDPModule)]
    assert units == ["", "h.0", "h.1", "h.2"]


def test_gradients_accumulate_before_they_are_reduced(mesh: DeviceMesh) -> None:
    """Micro-batches whose gradients are dropped, or reduced each time: slower by the number of them."""
    plain, sharded = pair(mesh)
    x = random_tokens(plain, 6)
    (objectives.next_pixel(plain(x), x).sum() / x.numel()).backward()
    parts = x.split(2)
    for i, part in enumerate(parts):
        parallel.reduce_gradients(sharded, now=i == len(parts) - 1)
        (objectives.next_pixel(sharded(part), part).sum() / x.numel()).backward()
    for name, a, b in both(plain, sharded, "grad"):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_lives_only_inside_the_step(mesh: DeviceMesh) -> None:
    """Master weights in bfloat16 swallow updates smaller than a 256th of the weight."""
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
