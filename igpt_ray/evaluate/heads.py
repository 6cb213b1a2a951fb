"""Heads: linear classifiers on the features of a layer, written by jobs/probe.py as classifier.npz."""

import io
from dataclasses import dataclass
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from igpt_ray import storage
from igpt_ray.data.token_format import Tokens
from igpt_ray.errors import FeatureError, NotFound
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
    try:
        data = storage.read(storage.join(uri, "classifier.npz"))
    except NotFound as error:
        raise FeatureError(f"no head at {uri}: expected the output folder of jobs/probe.py ({error})") from error
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            linear = Linear(arrays["mean"], arrays["deviation"], arrays["weight"], arrays["bias"])
            pooling, layer = str(arrays["pooling"]), int(arrays["layer"])
            precision, classes, release = str(arrays["precision"]), arrays["classes"].tolist(), str(arrays["release"])
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        raise FeatureError(
            f"{uri}/classifier.npz is damaged or of another version: repeat jobs/probe.py ({error})"
        ) from error
    if pooling not in POOLINGS or precision not in ("float32", "bfloat16"):
        raise FeatureError(f"{uri}/classifier.npz is of another version ({pooling}, {precision}): repeat jobs/probe.py")
    return Head(linear, layer, pooling, precision, classes, release)
