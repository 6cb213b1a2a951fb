"""A worker that Ray gives a GPU which torch cannot use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from igpt_ray.data.token_store import TokenStore
from igpt_ray.train.config import DataConfig, OptimConfig, PretrainConfig, RunConfig, WorkersConfig
from igpt_ray.train.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import ray
from igpt_ray.errors import SettingError
from igpt_ray.flows import train
from igpt_ray.train.config import PretrainConfig

ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False)
try:
    train.pretrain(PretrainConfig.model_validate_json(sys.argv[1]))
except SettingError as error:
    print("SettingError:", error)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device exists: its absence is not tested")
def test_a_worker_whose_gpu_torch_cannot_use_ends_the_run_with_the_reason(store: TokenStore, tmp_path: Path) -> None:
    """Ray counts GPUs that exist or that are declared. There are no retries, because all would fail."""
    tokens = {"n_px": store.kind.n_px, "n_vocab": store.kind.n_vocab}
    settings = PretrainConfig(
        model=PRESETS["tiny"][1].model.model_copy(update=tokens),
        optim=OptimConfig(batch_size=4, steps=4, warmup_steps=1),
        data=DataConfig(tokens=store.root),
        workers=WorkersConfig(gpus=1),
        run=RunConfig(root=str(tmp_path / "runs")),
    )
    words = [sys.executable, "-c", PROGRAM, settings.model_dump_json()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.stdout.startswith("SettingError: 1 GPU(s) were requested, but torch"), done.stderr[-3000:]
    assert "resuming from the last checkpoint" not in done.stderr
