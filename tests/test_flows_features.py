"""Features and probes on a cluster, against the same asked directly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt_ray import config, features, storage, weights
from igpt_ray.features import FeatureStore
from igpt_ray.flows.features import extract
from igpt_ray.shards import TokenStore, tokens_of

pytestmark = pytest.mark.ray


@pytest.fixture
def both(prepared: str, released: str) -> dict[str, Any]:
    return {"release": released, "tokens": storage.join(prepared, "tokens")}


def test_features_from_a_cluster_are_those_of_the_network_asked_directly(both: dict[str, Any], tmp_path: Path) -> None:
    """Units in the order in which actors happened to end."""
    settings = config.Features(**both, out=str(tmp_path), precision="float32", batch_size=7)
    report = extract(settings)
    assert report["units_made"] == report["units"] == 4
    tokens = np.concatenate([tokens_of(table) for table in TokenStore.open(both["tokens"]).read_split("train")])
    model = weights.load_release(both["release"]).model
    direct = features.pooled(model, tokens, [""] * len(tokens), [0, 1, 2], "mean", 64)
    for layer in range(3):
        np.testing.assert_allclose(FeatureStore(str(tmp_path)).layer("train", layer)[0], direct[:, layer], atol=1e-5)
    assert extract(settings)["units_made"] == 0
