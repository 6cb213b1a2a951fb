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
    choice = linear_probe.select(seen, cfg.model.n_class, cfg.seed, method)
    fitted = linear_probe.refit(seen, cfg.model.n_class, choice.setting, method)
    log.info("the head starts as a probe of %d images: %.1f%% right", len(rows), 100 * choice.validation)
    x = seen.examples[0].astype(np.float64)
    near = RIDGE * np.square(x).mean() * np.eye(x.shape[1])
    one = np.linalg.solve(x.T @ x / len(x) + near, x.mean(0))
    weight = fitted.weight / fitted.deviation
    return torch.from_numpy(weight + np.outer(fitted.bias - weight @ fitted.mean, one)).float()


def released_best(release: str) -> dict[str, Any]:
    """Step and held-out accuracy of the release of a fine-tuning run. Every rank calls it; rank 0 reads the release.

    A run that is resumed on another number of workers repeats its steps only nearly, so the best step of its metrics
    may differ from the step that was released before; the release is what counts.
    """
    trained = [weights.load_config(release).trained if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(trained)
    return {"best_step": trained[0]["step"], "val_accuracy": trained[0]["val_accuracy"]}
