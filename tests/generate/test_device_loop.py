"""The device loop: torch.compile changes neither its samples nor, by failing, its results."""

import pytest
import torch
from conftest import random_model, random_tokens
from torch import Tensor, nn

from igpt_ray import rng
from igpt_ray.generate import quantize
from igpt_ray.generate.device_loop import DeviceLoop, _recorded
from igpt_ray.generate.kv_cache import KVCache

SHAPE = {"qk_norm": True, "rotary": True}


def generated(loop: DeviceLoop, filtered: bool) -> Tensor:
    """Two samples of one image, the second slot idle: (3, 16)."""
    tokens = random_tokens(random_model(), 1)[0]
    mask = torch.arange(16) % 5 == 0
    top_k = 3 if filtered else 0
    loop.load([0, 2], tokens, mask, rng.uniforms([1, 2], 16), [0.5, 0.5], [top_k, top_k], [1, 1])
    return loop.run([0, 2], [0, 0], 16, filtered)[[0, 2]]


@pytest.mark.slow
def test_the_compiled_step_gives_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the layers are plain ones; those packed for oneDNN cannot be compiled."""

    class Plain(nn.Linear):
        def __init__(self, weight: Tensor):
            super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
            self.weight = nn.Parameter(weight, requires_grad=False)

    monkeypatch.setattr(quantize, "Packed", Plain)
    model = random_model(std=0.1, **SHAPE)
    compiled, eager = (DeviceLoop(KVCache(model, 3, "float32"), compiled) for compiled in (True, False))
    assert compiled.compiled
    for filtered in (False, True):
        assert torch.equal(generated(compiled, filtered), generated(eager, filtered))


def test_a_failure_of_torch_compile_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The layers packed for oneDNN cannot be compiled where their weights are inputs."""
    model = random_model(std=0.1)
    loop = DeviceLoop(KVCache(model, 3, "float32"), compiled=True)
    assert not loop.compiled
    assert "torch.compile failed" in caplog.text
    assert torch.equal(generated(loop, False), generated(DeviceLoop(KVCache(model, 3, "float32"), False), False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device: recording does not fail")
def test_a_failure_of_the_recording_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Without a CUDA device it fails."""
    loop = DeviceLoop(KVCache(random_model(), 1, "float32"))
    assert _recorded(loop._plain_step, torch.device("cuda", 0)) == loop._plain_step
    assert "recording a CUDA graph failed" in caplog.text
