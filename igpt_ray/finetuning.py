"""Fine-tuning: what it adds to the training loop. It starts from a release, looks for the best step, and ends after it.

What is known of earlier looks stands in the run's lines, so that a resumed run stops where it would have.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from igpt_ray import config, metrics, weights
from igpt_ray.augment import Augment
from igpt_ray.model import ImageGPT


def augment_of(cfg: config.Pretrain) -> Augment | None:
    """None where images stay as they are."""
    if not isinstance(cfg, config.Tuning) or not (cfg.tune.pad or cfg.tune.flip):
        return None
    return Augment(cfg.model.n_px, cfg.tune.pad, cfg.tune.flip)


def start(model: ImageGPT, cfg: config.Pretrain) -> None:
    """Give a sharded network the weights of the release; a head that the release lacks keeps its zeros.

    Called by all workers together; the first reads them and hands them out. Does nothing in pretraining.
    """
    if not isinstance(cfg, config.Tuning) or cfg.tune.scratch:
        return
    given = weights.load_release(cfg.release).model.state_dict() if dist.get_rank() == 0 else {}
    if given and "wclf.weight" not in given:
        given["wclf.weight"] = torch.zeros(cfg.model.n_class, cfg.model.n_embd)
    set_model_state_dict(model, given, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


class Best:
    """The line with the highest held-out accuracy, the first of equals; its weights are the release.

    In pretraining there is none, and it is never enough.
    """

    def __init__(self, cfg: config.Pretrain, lines: metrics.Metrics):
        self.patience = cfg.tune.patience if isinstance(cfg, config.Tuning) else 0
        self.release = cfg.run.release
        self.lines = lines.lines

    @property
    def looks(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "val_accuracy" in line]

    @property
    def line(self) -> dict[str, Any] | None:
        return max(self.looks, key=lambda line: line["val_accuracy"], default=None)

    def is_new(self) -> bool:
        """Whether the last line is the best."""
        return self.line is not None and self.line is self.lines[-1]

    def enough(self) -> bool:
        """Whether as many looks as the patience have come since the best."""
        if self.line is None:
            return False
        return len(self.looks) - 1 - self.looks.index(self.line) >= self.patience

    def found(self) -> dict[str, Any]:
        """What the release says of itself, on all workers.

        Resumed by another number of workers a run repeats its steps only nearly, so that the best step of its lines
        may then be another than the one that was released before.
        """
        told = [weights.load_config(self.release).trained if dist.get_rank() == 0 else {}]
        dist.broadcast_object_list(told)
        return {"best_step": told[0]["step"], "val_accuracy": told[0]["val_accuracy"]}
