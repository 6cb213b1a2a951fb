"""Copies of a state in host memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from igpt_ray.train import checkpoint, parallelize
from igpt_ray.train.host_copy import HostCopy
from tests.train.test_checkpoint import Trainee

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=[pytest.mark.gpu, cuda])]


def state_on(device: str, n: int) -> dict[str, Any]:
    mesh = parallelize.mesh_of(device, None)
    sharded = DTensor.from_local(torch.arange(float(n), device=device), mesh, [Shard(0)], run_check=False)
    return {"plain": torch.full((3, n), 7.0, device=device), "sharded": sharded, "count": torch.tensor(2.0), "lr": 0.5}


def leaves_of(state: dict[str, Any]) -> list[Tensor]:
    return [x.to_local() if isinstance(x, DTensor) else x for x in state.values() if isinstance(x, Tensor)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_is_of_the_state_when_it_was_made_and_its_memory_is_reused(process_group: None, device: str) -> None:
    """The work that changes the state afterwards is queued without a wait of the host."""
    state, copy = state_on(device, 1 << 16), HostCopy()
    copy.update(state)
    addresses = [x.data_ptr() for x in leaves_of(copy.state)]
    for last in (False, True):
        copy.protect()
        for x in leaves_of(state):
            x.add_(1)
        if last:
            state["lr"] = 0.25
            copy.update(state)
        copy.wait()
        plain, sharded, count = leaves_of(copy.state)
        assert torch.equal(plain, torch.full((3, 1 << 16), 9.0 if last else 7.0))
        assert torch.equal(sharded, torch.arange(float(1 << 16)) + 2 * last)
        assert (count.item(), copy.state["lr"]) == ((4, 0.25) if last else (2, 0.5))
        assert isinstance(copy.state["sharded"], DTensor)
        assert {x.device.type for x in leaves_of(copy.state)} == {"cpu"}
        assert plain.is_pinned() == sharded.is_pinned() == (device == "cuda")
    assert [x.data_ptr() for x in leaves_of(copy.state)] == addresses


def test_a_state_of_another_structure_gets_other_memory(process_group: None) -> None:
    copy = HostCopy()
    copy.update({"a": torch.zeros(2)})
    copy.update({"a": torch.ones(2), "b": {"c": torch.ones(3)}})
    assert [x.tolist() for x in (copy.state["a"], copy.state["b"]["c"])] == [[1, 1], [1, 1, 1]]


@pytest.mark.parametrize("modern", [False, True])
def test_every_update_after_a_save_waits_for_its_copy(
    process_group: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, modern: bool
) -> None:
    """The weights are still those of the save when `protect` is called."""
    trainee, protect, weights = Trainee(1, modern=modern).train(0), HostCopy.protect, []

    def watched(copy: HostCopy) -> None:
        weights.append(trainee.model.blocks[0].mlp.c_fc.weight.detach().clone())
        protect(copy)

    monkeypatch.setattr(HostCopy, "protect", watched)
    saver = checkpoint.Saver(str(tmp_path / "run"))
    saved = trainee.model.blocks[0].mlp.c_fc.weight.detach().clone()
    trainee.begin(saver, 1)
    trainee.train(1)
    assert weights
    assert torch.equal(weights[0], saved)
    assert not torch.equal(trainee.model.blocks[0].mlp.c_fc.weight, saved)
    saver.finish()
