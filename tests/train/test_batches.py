"""Micro-batches: padding to equal passes, and the preparation of the next step's while a step computes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from igpt_ray.data.loader import SplitCache, global_batch
from igpt_ray.data.token_store import TokenStore
from igpt_ray.model import losses
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train import loop
from igpt_ray.train.batches import MicroBatchLoader, equal_micro_batch
from tests.train.test_loop import CPU, settings_for


def sums_and_gradients(model: ImageGPT, loader: MicroBatchLoader, size: int) -> tuple[list[int], Tensor, list[Tensor]]:
    """Of the passes of one batch of `size` images: images per pass, loss sums, gradients of the loss."""
    model.zero_grad()
    passes = loader.micro_batches(global_batch(loader.seed, 3, size, len(loader.images)))
    sums = [micro.loss_sums(model) for micro in passes]
    total = torch.stack(sums).sum(0)
    total[0].backward()
    return [len(micro.tokens) for micro in passes], total.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("size", [3, 4, 7])
@pytest.mark.parametrize("changes", [{}, {"objective": "masked"}, {"n_class": 2}], ids=["next", "masked", "labelled"])
def test_padding_changes_neither_losses_nor_gradients(
    process_group: None, store: TokenStore, changes: dict[str, Any], size: int
) -> None:
    config = ModelConfig(n_layer=2, n_embd=32, n_head=2, n_px=4, n_vocab=16, **changes)
    torch.manual_seed(0)
    model = ImageGPT(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # the output layers, too
    images = SplitCache(store, "train", labelled=bool(changes.get("n_class")))
    padded, sums, gradients = sums_and_gradients(model, MicroBatchLoader(images, config, 5, 4, CPU, equal=True), size)
    exact, expected, expected_gradients = sums_and_gradients(model, MicroBatchLoader(images, config, 5, 4, CPU), size)
    assert sum(exact) == size
    assert padded == [4] * math.ceil(size / 4)
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)  # a loss is computed in float32
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)


def test_equal_passes_are_as_few_as_unequal_ones_and_padding_is_less_than_one_image_per_pass() -> None:
    assert equal_micro_batch(128, 1, 50) == 43
    for batch_size in range(1, 40):
        for world_size in range(1, 6):
            for micro_batch in range(1, 12):
                per_rank = math.ceil(batch_size / world_size)
                size = equal_micro_batch(batch_size, world_size, micro_batch)
                n = math.ceil(per_rank / micro_batch)
                assert size <= micro_batch
                assert math.ceil(per_rank / size) == n
                assert n * size - per_rank < n


def test_the_next_batch_is_prepared_before_the_step_waits_and_the_last_step_prepares_none(
    process_group: None, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    micro_batches, reduce_step, tolist = MicroBatchLoader.micro_batches, loop._reduce_step, torch.Tensor.tolist
    reduced = []

    def prepared(*arguments: Any) -> Any:
        events.append("prepare")
        return micro_batches(*arguments)

    def step_sums(*arguments: Any) -> Any:
        reduced.append(reduce_step(*arguments))
        return reduced[-1]

    def read(tensor: torch.Tensor) -> Any:
        if any(tensor is sums for sums in reduced):
            events.append("wait")
        return tolist(tensor)

    monkeypatch.setattr(MicroBatchLoader, "micro_batches", prepared)
    monkeypatch.setattr(loop, "_reduce_step", step_sums)
    monkeypatch.setattr(torch.Tensor, "tolist", read)
    loop.train(settings_for(store, tmp_path, optim={"steps": 3}), CPU)
    assert events == ["prepare", "prepare", "wait", "prepare", "wait", "wait"]


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_without_clipping_the_norm_is_computed_and_the_gradients_are_not_written(
    process_group: None, store: TokenStore, tmp_path: Path
) -> None:
    model = loop.build(settings_for(store, tmp_path), CPU)[0]
    losses.generative(model, torch.arange(32).view(2, 16) % 16).backward()
    with Operators() as without:
        norm = loop._clipped_grad_norm(model, None)
    with Operators() as clipping:
        assert loop._clipped_grad_norm(model, 0.05).full_tensor() == norm.full_tensor() > 0.1
    assert clipping.names - without.names >= {"_foreach_mul_"}
    assert clip_grad_norm_(model.parameters(), math.inf).full_tensor() == pytest.approx(0.05, rel=1e-4)
