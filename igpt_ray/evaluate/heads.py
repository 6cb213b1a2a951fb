"""Heads: linear classifiers of a layer's features, as jobs/probe.py leaves them in classifier.npz."""

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
    """Of the network whose features it was fitted on."""
    classes: list[str]
    release: str
    """sha256 of that network's weights."""

    def probabilities(self, model: ImageGPT, tokens: Tokens, keys: list[str], batch_size: int) -> NDArray[np.float64]:
        """(N, T) -> (N, K); under a masked network, which looks under MASKS masks, (N, MASKS, K)."""
        found = features.pooled(model, tokens, keys, [self.layer], self.pooling, batch_size)[..., 0, :]
        return probabilities(self.linear.logits(found))


def load_head(uri: str) -> Head:
    """The head in the folder that jobs/probe.py wrote. Raises `FeatureError` if it is damaged or there is none."""
    try:
        data = storage.read(storage.join(uri, "classifier.npz"))
    except NotFound as error:
        raise FeatureError(f"no head at {uri}: expected the out folder of jobs/probe.py ({error})") from error
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as kept:
            linear = Linear(kept["mean"], kept["deviation"], kept["weight"], kept["bias"])
            pooling, layer = str(kept["pooling"]), int(kept["layer"])
            precision, classes, release = str(kept["precision"]), kept["classes"].tolist(), str(kept["release"])
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        raise FeatureError(
            f"{uri}/classifier.npz is damaged or of another version: repeat jobs/probe.py ({error})"
        ) from error
    if pooling not in POOLINGS or precision not in ("float32", "bfloat16"):
        raise FeatureError(f"{uri}/classifier.npz is of another version ({pooling}, {precision}): repeat jobs/probe.py")
    return Head(linear, layer, pooling, precision, classes, release)
