"""What `gpu_learn` measures of a release on the test images: likelihood, linear probes, classes and completions."""

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from igpt_ray import rng
from igpt_ray.data import pixels
from igpt_ray.data.loader import SplitCache
from igpt_ray.data.token_format import Tokens
from igpt_ray.data.token_store import TokenStore
from igpt_ray.evaluate import features, likelihood, linear_probe
from igpt_ray.evaluate.linear_probe import Labelled, Method
from igpt_ray.generate import completion
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train.batches import evenly_spaced_batch

log = logging.getLogger(__name__)

Report = dict[str, Any]

SELECTION_IMAGES = 15_000
"""Training images on which the probe selects its layer."""
AROUND = 2
"""Layers on either side of the best whose features are concatenated; the paper also uses five layers."""
PICTURES, COMPLETIONS = 8, 4
FORWARD_IMAGES = 250
"""Images per forward pass of evaluations."""


def network(release: str, device: torch.device) -> ImageGPT:
    """The network of a release, in bfloat16 on a GPU."""
    return features.network(release, str(device), None, "bfloat16" if device.type == "cuda" else "float32")


def labelled_split(store: TokenStore, split: str) -> tuple[Tokens, NDArray[np.int64]]:
    """All tokens (N, T) and labels (N,) of a split, in order."""
    images = SplitCache(store, split, labelled=True)
    batch = evenly_spaced_batch(images, len(images))
    return images[batch], images.labels_of(batch)


def with_mirror_images(tokens: Tokens, n_px: int) -> Tokens:
    """(N, T) -> (2 N, T): each image and its mirror image."""
    mirrored = tokens.reshape(-1, n_px, n_px)[:, :, ::-1].reshape(tokens.shape)
    return np.stack([tokens, mirrored], axis=1).reshape(-1, tokens.shape[1])


def layer_features(model: ImageGPT, tokens: Tokens, mirror: bool) -> NDArray[np.float32]:
    """Pooled features of every layer, of each image or of each image and its mirror image: (N, 1 or 2, layers, C)."""
    layers, examples = list(range(model.config.n_layer + 1)), 2 if mirror else 1
    images = with_mirror_images(tokens, model.config.n_px) if mirror else tokens
    pooled = features.pooled(model, images, [], layers, "mean", FORWARD_IMAGES)
    return pooled.reshape(len(tokens), examples, len(layers), -1)


def probe_release(release: str, store: TokenStore, device: torch.device, mirror: bool) -> Report:
    """Linear probes of the best layer and of the concatenation of five layers around it: accuracy on the test images.

    The layer is selected on held-out training images. With `mirror`, also probes that are fitted on mirror images as
    well, and add the votes of an image and its mirror image.
    """
    model, n_classes = network(release, device), len(store.manifest.classes)
    (fit, fit_labels), (test, test_labels) = (
        (layer_features(model, tokens, mirror), labels)
        for tokens, labels in (labelled_split(store, split) for split in ("train+holdout", "test"))
    )
    method, n_layers = Method(device=str(device)), fit.shape[2]
    rows = np.linspace(0, len(fit) - 1, min(len(fit), SELECTION_IMAGES)).astype(np.int64)
    few = [Labelled(np.ascontiguousarray(fit[rows, 0, layer]), fit_labels[rows]) for layer in range(n_layers)]
    by_layer = [linear_probe.select(data, n_classes, 0, method).validation for data in few]
    best = int(np.argmax(by_layer))
    report: Report = {"selection_accuracy_by_layer": by_layer, "layer": best}
    for name, around in {"best_layer": 0, "five_layers": AROUND}.items():
        layers = slice(max(0, best - around), best + around + 1)
        for variant, examples in {"": 1, "_mirrored": 2}.items():
            if examples > fit.shape[1]:
                continue
            x, held_out = (
                np.ascontiguousarray(f[:, :examples, layers]).reshape(len(f), examples, -1) for f in (fit, test)
            )
            data, test_data = Labelled(x, fit_labels), Labelled(held_out, test_labels)
            choice = linear_probe.select(data, n_classes, 0, method)
            linear = linear_probe.refit(data, n_classes, choice.setting, method)
            sums = linear_probe.evaluate_classifier(linear, test_data, np.arange(len(test_data)), n_classes)
            report[name + variant] = {"penalty": choice.setting, **sums.report()}
            log.info("probe of %s%s: %.2f %%", name, variant, 100 * sums.accuracy)
    return report


def nats_per_token(release: str, store: TokenStore, device: torch.device) -> float:
    """Of the test images."""
    tokens, _ = labelled_split(store, "test")
    return float(likelihood.image_nats(network(release, device), tokens, FORWARD_IMAGES).mean() / tokens.shape[1])


def classification(release: str, store: TokenStore, device: torch.device) -> Report:
    """Classes of the test images by a fine-tuned release, and by its votes for an image and its mirror image."""
    tokens, labels = labelled_split(store, "test")
    pairs = with_mirror_images(tokens, store.kind.n_px)
    logits = likelihood.class_logits(network(release, device), pairs, [], FORWARD_IMAGES).reshape(len(labels), 2, -1)
    one, both = (linear_probe.evaluate_logits(x, labels, logits.shape[2]) for x in (logits[:, 0], logits))
    return {"test": one.report(), "test_mirrored": both.report(), "confusion": one.confusion.tolist()}


def sheet(release: str, store: TokenStore, device: torch.device) -> bytes:
    """A PNG of completions of the lower halves of test images."""
    images, n_px = SplitCache(store, "test"), store.kind.n_px
    originals = images[evenly_spaced_batch(images, PICTURES)]
    prompt = torch.from_numpy(originals[:, : n_px // 2 * n_px].astype(np.int64)).to(device)
    seeds = [rng.seed_of("sheet", i) for i in range(len(originals) * COMPLETIONS)]
    done = completion.complete(network(release, device), prompt, COMPLETIONS, seeds).cpu().numpy().astype(np.uint16)
    by_image = done.reshape(len(originals), COMPLETIONS, -1)
    return pixels.png(completion.figure(store.palette(), originals, by_image, n_px // 2))
