"""The automatic micro-batch on a real GPU: it fits, and it uses the memory that the estimate says."""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed as dist

from igpt_ray.model import losses
from igpt_ray.train import estimate, loop, parallelize
from igpt_ray.train.config import OptimConfig, PretrainConfig, WorkersConfig
from igpt_ray.train.memory import micro_batch_that_fits
from igpt_ray.train.presets import PRESETS


def _train_two_steps(cfg: PretrainConfig, device: torch.device, micro_batch: int | None) -> tuple[int, int]:
    """Images per pass, and passes per step, of two steps with `micro_batch`, or with the largest that fits."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    micro_batch = micro_batch or micro_batch_that_fits(cfg, device)
    model, optimizer = loop.build(cfg, device)
    passes = math.ceil(cfg.optim.batch_size / micro_batch)
    images = math.ceil(cfg.optim.batch_size / passes)
    tokens = torch.zeros(images, cfg.model.n_positions, dtype=torch.int64, device=device)
    for _ in range(2):
        for i in range(passes):
            parallelize.reduce_gradients(model, i == passes - 1)
            losses.next_pixel(model(tokens), tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return images, passes


def _measure(cfg: PretrainConfig) -> tuple[int, int, int]:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    images, passes = _train_two_steps(cfg, device, None)
    return images, passes, torch.cuda.max_memory_allocated(device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the automatic micro-batch is not tested")
@pytest.mark.parametrize(("name", "batch_size"), [("igpt-s", 64), ("igpt-s", 768), ("igpt-s-modern", 768)])
def test_the_automatic_micro_batch_fits_and_uses_the_estimated_memory(name: str, batch_size: int) -> None:
    """One pass; and several, whose gradients are accumulated."""
    free, total = torch.cuda.mem_get_info()
    if free < 0.95 * total:
        pytest.skip("another process uses the GPU's memory: run this file alone")
    preset = PRESETS[name][1]
    optim = preset.optim.model_copy(update={"batch_size": batch_size})
    cfg = preset.model_copy(update={"optim": optim, "workers": WorkersConfig(gpus=1, compile=False)}).resolved(True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one:
        images, passes, peak = one.submit(_measure, cfg).result()
    assert (passes > 1) == (batch_size == 768)
    expected = sum(estimate.memory_bytes(cfg, images, passes).values())
    assert peak == pytest.approx(expected, rel=0.06)


def test_the_measured_steps_run_on_the_cpu() -> None:
    """So that only the GPU's part is first run on a GPU."""
    optim = OptimConfig(batch_size=6, muon_lr=0.02)
    cfg = PretrainConfig(model=PRESETS["tiny-modern"][1].model, optim=optim).resolved(on_gpu=False)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one:
        assert one.submit(_train_two_steps, cfg, torch.device("cpu"), 4).result() == (3, 2)
