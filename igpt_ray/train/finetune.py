"""Fine-tuning on top of the training loop: initial weights from a release, augmentation, and the best step."""

import logging
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from igpt_ray import weights
from igpt_ray.data.augment import Augment
from igpt_ray.data.loader import SplitCache
from igpt_ray.data.token_store import TokenStore
from igpt_ray.evaluate import features, linear_probe
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train.batches import evenly_spaced_batch
from igpt_ray.train.config import FinetuneRunConfig, PretrainConfig

log = logging.getLogger(__name__)

PROBED = 10_000
"""Largest number of images that rank 0 fits the initial head on, while the other ranks wait."""
BATCH = 64
"""Images per forward pass."""
RIDGE = 0.01
"""Ridge, relative to the features' mean square, that limits the norm of the bias direction."""


def augment_of(cfg: PretrainConfig) -> Augment | None:
    """The augmentation of a fine-tuning run; None without."""
    if not isinstance(cfg, FinetuneRunConfig) or not (cfg.tune.pad or cfg.tune.flip):
        return None
    return Augment(cfg.model.n_px, cfg.tune.pad, cfg.tune.flip)


def start(model: ImageGPT, cfg: PretrainConfig) -> None:
    """Load the weights of the release into a sharded network, with a new head if the release has none.

    Every rank must call it; rank 0 reads the weights and broadcasts them. Does nothing in pretraining.
    """
    if not isinstance(cfg, FinetuneRunConfig) or cfg.tune.scratch:
        return
    state = _released_state(cfg, str(model.wpe.device)) if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def _released_state(cfg: FinetuneRunConfig, device: str) -> dict[str, Any]:
    probed = cfg.tune.head == "probe"
    released = weights.load_release(cfg.release, device if probed else "cpu").model
    state = released.state_dict()
    if "wclf.weight" not in state:
        shape = (cfg.model.n_class, cfg.model.n_embd)
        state["wclf.weight"] = probed_head(released, cfg) if probed else torch.zeros(shape)
    return {name: weight.cpu() for name, weight in state.items()}


def probed_head(model: ImageGPT, cfg: FinetuneRunConfig) -> Tensor:
    """Weights (n_class, C) of a head, equivalent to a linear probe of the last layer's features.

    The head has no bias. The direction whose product with the features is nearest to 1 replaces the probe's bias.
    """
    store = TokenStore.open(cfg.data.tokens)
    images = SplitCache(store, cfg.data.split, labelled=True)
    batch = evenly_spaced_batch(images, PROBED)
    keys, last = [str(row) for row in batch.rows], [cfg.model.n_layer]
    pooled = features.pooled(model, images[batch], keys, last, "mean", BATCH)[..., 0, :]
    examples, method = linear_probe.Labelled(pooled, images.labels_of(batch)), linear_probe.Method(seed=cfg.seed)
    choice = linear_probe.select(examples, cfg.model.n_class, cfg.seed, method)
    fitted = linear_probe.refit(examples, cfg.model.n_class, choice.setting, method)
    log.info(
        "the head is initialised by a linear probe of %d images, accuracy %.1f %%", len(keys), 100 * choice.validation
    )
    x = examples.examples[0].astype(np.float64)
    near = RIDGE * np.square(x).mean() * np.eye(x.shape[1])
    one = np.linalg.solve(x.T @ x / len(x) + near, x.mean(0))
    weight = fitted.weight / fitted.deviation
    return torch.from_numpy(weight + np.outer(fitted.bias - weight @ fitted.mean, one)).float()


def released_best(release: str) -> dict[str, Any]:
    """Step and held-out accuracy of the release of a fine-tuning run. Every rank calls it; rank 0 reads the release.

    After a resume on another number of workers, repeated steps differ slightly, so the best step in the metrics may
    differ from the step of the release; the release is authoritative.
    """
    trained = [weights.load_config(release).trained if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(trained)
    return {"best_step": trained[0]["step"], "val_accuracy": trained[0]["val_accuracy"]}
