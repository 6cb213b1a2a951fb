"""Training in one process, with no other process group and without the libraries that training does not use."""

import subprocess
import sys
from pathlib import Path

from igpt_ray.data.token_store import TokenStore
from igpt_ray.train import checkpoint
from tests.train.test_loop import STEPS, losses_of, settings_for

FORBIDDEN = ("ray", "faiss", "boto3", "tyro", "fastapi")

PROGRAM = f"""
import sys
sys.modules |= dict.fromkeys({FORBIDDEN})  # None: an import of the module fails
import torch
from igpt_ray.errors import TokenStoreError
from igpt_ray.train.alone import train_alone
from igpt_ray.train.config import PretrainConfig
cfg = PretrainConfig.model_validate_json(sys.argv[1])
try:
    print(train_alone(cfg, torch.device("cpu"))["step"])
except TokenStoreError as error:
    print("TokenStoreError")
print(torch.distributed.is_initialized())
"""


def train_in_a_child(settings: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_run_of_one_process_needs_neither_ray_nor_faiss_nor_boto3(store: TokenStore, tmp_path: Path) -> None:
    """It can be resumed, and leaves no process group."""
    cfg = settings_for(store, tmp_path)
    assert train_in_a_child(cfg.model_dump_json()) == [str(STEPS), "False"]
    losses = losses_of(cfg.run.uri)
    assert list(losses) == list(range(2, STEPS + 1, 2))
    checkpoint.rewind(cfg.run.uri, 4)
    assert train_in_a_child(cfg.model_dump_json()) == [str(STEPS), "False"]
    assert losses_of(cfg.run.uri) == losses


def test_a_run_that_fails_leaves_no_process_group(store: TokenStore, tmp_path: Path) -> None:
    cfg = settings_for(store, tmp_path, data={"tokens": str(tmp_path / "nothing")})
    assert train_in_a_child(cfg.model_dump_json()) == ["TokenStoreError", "False"]
