"""Fine-tuning: what it adds to the training loop. It starts from a release, looks for the best step, and ends after it.

What is known of earlier looks stands in the run's lines, so that a resumed run stops where it would have.
"""

import logging
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from igpt_ray import weights
from igpt_ray.data.augment import Augment
from igpt_ray.data.loader import Batch, SplitCache
from igpt_ray.data.token_store import TokenStore, evenly
from igpt_ray.evaluate import features, linear_probe
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train import metrics
from igpt_ray.train.config import FinetuneRunConfig, PretrainConfig

log = logging.getLogger(__name__)

PROBED = 10_000
"""Images that a head is fitted on at most, spread evenly: the first worker looks at them while the others wait."""
BATCH = 64
"""Of them, at once."""
RIDGE = 0.01
"""Of the features' mean square: keeps the direction of the bias short."""


def augment_of(cfg: PretrainConfig) -> Augment | None:
    """None where images stay as they are."""
    if not isinstance(cfg, FinetuneRunConfig) or not (cfg.tune.pad or cfg.tune.flip):
        return None
    return Augment(cfg.model.n_px, cfg.tune.pad, cfg.tune.flip)


def start(model: ImageGPT, cfg: PretrainConfig) -> None:
    """Give a sharded network the weights of the release, and a head if the release lacks one.

    Called by all workers together; the first reads them and hands them out. Does nothing in pretraining.
    """
    if not isinstance(cfg, FinetuneRunConfig) or cfg.tune.scratch:
        return
    given = _given(cfg, str(model.wpe.device)) if dist.get_rank() == 0 else {}
    set_model_state_dict(model, given, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def _given(cfg: FinetuneRunConfig, device: str) -> dict[str, Any]:
    probed = cfg.tune.head == "probe"
    released = weights.load_release(cfg.release, device if probed else "cpu").model
    given = released.state_dict()
    if "wclf.weight" not in given:
        shape = (cfg.model.n_class, cfg.model.n_embd)
        given["wclf.weight"] = probed_head(released, cfg) if probed else torch.zeros(shape)
    return {name: weight.cpu() for name, weight in given.items()}


def probed_head(model: ImageGPT, cfg: FinetuneRunConfig) -> Tensor:
    """(n_class, C): what a linear probe of the last features says, as a head can say it.

    A head has no bias. The direction whose product with all features is nearest to 1 carries the probe's.
    """
    store = TokenStore.open(cfg.data.tokens)
    images = SplitCache(store, cfg.data.split, labelled=True)
    rows = evenly(len(images), PROBED)
    batch = Batch(np.zeros_like(rows), rows)
    keys, last = [str(row) for row in rows], [cfg.model.n_layer]
    found = features.pooled(model, images[batch], keys, last, "mean", BATCH)[..., 0, :]
    seen, method = linear_probe.Labelled(found, images.labels_of(batch)), linear_probe.Method(seed=cfg.seed)
    choice = linear_probe.choose(seen, cfg.model.n_class, cfg.seed, method)
    fitted = linear_probe.refit(seen, cfg.model.n_class, choice.setting, method)
    log.info("the head starts as a probe of %d images: %.1f%% right", len(rows), 100 * choice.validation)
    x = seen.examples[0].astype(np.float64)
    near = RIDGE * np.square(x).mean() * np.eye(x.shape[1])
    one = np.linalg.solve(x.T @ x / len(x) + near, x.mean(0))
    weight = fitted.weight / fitted.deviation
    return torch.from_numpy(weight + np.outer(fitted.bias - weight @ fitted.mean, one)).float()


class Best:
    """The line with the highest held-out accuracy, the first of equals; its weights are the release.

    In pretraining there is none, and it is never enough.
    """

    def __init__(self, cfg: PretrainConfig, lines: metrics.Metrics):
        self.patience = cfg.tune.patience if isinstance(cfg, FinetuneRunConfig) else 0
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
