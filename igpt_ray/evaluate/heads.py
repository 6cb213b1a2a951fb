"""Heads: linear classifiers on the features of a layer, written by jobs/probe.py as classifier.npz."""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from igpt_ray import artifact, storage
from igpt_ray.data.token_format import Tokens
from igpt_ray.errors import FeatureError
from igpt_ray.evaluate import features
from igpt_ray.evaluate.features import POOLINGS, Pooling
from igpt_ray.evaluate.logistic import Linear, probabilities
from igpt_ray.model.image_gpt import ImageGPT


@dataclass(frozen=True)
class Head:
    linear: Linear
    layer: int
    pooling: Pooling
    precision: str
    """Precision of the network whose features the head was fitted on."""
    classes: list[str]
    release: str
    """sha256 of the weights of that network."""

    def probabilities(self, model: ImageGPT, tokens: Tokens, keys: list[str], batch_size: int) -> NDArray[np.float64]:
        """(N, T) -> (N, K); of a masked network (N, MASKS, K)."""
        pooled = features.pooled(model, tokens, keys, [self.layer], self.pooling, batch_size)[..., 0, :]
        return probabilities(self.linear.logits(pooled))


def load_head(uri: str) -> Head:
    """Load the head from the output folder of jobs/probe.py. Raises `FeatureError` if it is missing or damaged."""

    def parse(data: bytes) -> Head:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            linear = Linear(arrays["mean"], arrays["deviation"], arrays["weight"], arrays["bias"])
            pooling, layer = str(arrays["pooling"]), int(arrays["layer"])
            precision, classes, release = str(arrays["precision"]), arrays["classes"].tolist(), str(arrays["release"])
        if pooling not in POOLINGS or precision not in ("float32", "bfloat16"):
            raise ValueError(f"pooling {pooling}, precision {precision}")
        return Head(linear, layer, pooling, precision, classes, release)

    missing = f"no head at {uri}: expected the output folder of jobs/probe.py"
    damaged = f"{uri}/classifier.npz is damaged or of another version: repeat jobs/probe.py"
    return artifact.load(storage.join(uri, "classifier.npz"), parse, FeatureError, missing, damaged)
