"""Benchmarks of probes and features: both sides solve the same problem."""

import pytest
import torch
from conftest import random_model, random_tokens

from benchmarks import features, probe
from benchmarks.probe import BenchProbeConfig


def test_both_fits_minimise_the_same_loss() -> None:
    """A different penalty would make one side's problem easier."""
    report = probe.probe(BenchProbeConfig(rows=600, width=12, classes=3, l2=1e-2, rounds=1, threads=1))
    assert all(0 <= report["gap"][name] < 1e-4 * report["loss"] for name in ("ours", "scikit-learn, on"))
    assert report["gap"]["ours, 10"] >= report["gap"]["ours"]
    assert report["equal_predictions"]["scikit-learn, on"] > 0.99


def test_features_synthetic_are_correlated_and_the_same_each_time() -> None:
    x, y = probe.synthetic(2000, 32, 4)
    values = torch.linalg.eigvalsh(torch.from_numpy(x).T.cov())
    assert values[-1] > 300 * values[0]
    again, labels = probe.synthetic(2000, 32, 4)
    assert (x == again).all()
    assert (y == labels).all()


@pytest.mark.parametrize("last", [1, 3])
def test_both_implementations_return_the_same_features(last: int) -> None:
    """A speed ratio means nothing if one side computes something else."""
    model = random_model(std=0.15)
    tokens = random_tokens(model, 3)
    ours = features.ours(model, tokens, torch.float32, last, compiled=False)()
    theirs = features.transformers(model, tokens, torch.float32, last)()
    assert ours.shape == (3, last + 1, 32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
