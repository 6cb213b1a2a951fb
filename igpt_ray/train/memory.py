"""The micro-batch that fits into the memory of every worker's GPU."""

import logging

import torch
import torch.distributed as dist

from igpt_ray.train import estimate
from igpt_ray.train.config import PretrainConfig

log = logging.getLogger(__name__)


def micro_batch_that_fits(cfg: PretrainConfig, device: torch.device) -> int:
    """The largest micro-batch that fits into the memory of every worker, by `estimate.py`. Every rank must call it.

    The whole memory of a GPU counts, not the free part: a worker has a GPU for itself, and the number must be the same
    when a run is resumed.
    """
    memory = torch.cuda.get_device_properties(device).total_memory
    share = -(-cfg.optim.batch_size // dist.get_world_size())
    fitting = torch.tensor(estimate.images_that_fit(cfg, share, memory), device=device)
    dist.all_reduce(fitting, dist.ReduceOp.MIN)
    n = int(fitting)
    if dist.get_rank() == 0:
        log.info("micro-batches of %d image(s) fit into %.0f GB", n, memory / estimate.GB)
    return n
