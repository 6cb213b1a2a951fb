"""Benchmark of samplers: all generate the same image, and both batching modes serve the same requests."""

import numpy as np
import pytest
from conftest import random_model

from benchmarks import serve
from benchmarks.serve import BenchServeConfig
from igpt_ray.generate.engine import Engine, Generation

TINY = BenchServeConfig(
    n_layer=2, n_embd=32, n_head=2, n_px=8, pixels=20, batches=(1, 3), slots=2, requests=6, threads=1
)


def test_all_completers_generate_the_same_pixels() -> None:
    """A speed ratio means nothing if one side computes less, or continues another prompt."""
    model = random_model(std=0.15, n_px=6)
    x = serve.random_images(model, 3)
    expected = serve.transformers(model, "float32")(x, 10)
    assert expected.shape == (3, 10)
    assert len(np.unique(expected)) > 3
    assert (serve.ours(model, 3, "float32")(x, 10) == expected).all()
    assert (serve.uncached(model.bfloat16().float())(x, 1) == expected[:, :1]).mean() > 0.5


def test_the_report_has_every_figure() -> None:
    report = serve.serve(TINY)
    for batch in ("1", "3"):
        figures = report["batches"][batch]
        assert figures["same_tokens_as_transformers_float32"]["ours float32"] == 1
        assert all(rate > 0 for clock in ("wall", "cpu") for rate in figures[clock]["tokens_per_second"].values())
        assert set(figures["cpu"]["over_transformers"]) == {"ours float32", "ours bfloat16", "ours int8"}
    assert "without a cache, bfloat16" in report["batches"]["1"]["wall"]["tokens_per_second"]
    assert report["load"]["same_tokens"]
    assert 0 < report["quality"]["bfloat16"]["nats_lost"] < report["quality"]["int8"]["nats_lost"] < 0.1


@pytest.mark.parametrize("continuous", [True, False])
def test_fixed_batches_admit_requests_only_when_idle(continuous: bool) -> None:
    """Three requests for two slots arrive together, and the first is short. With continuous batching the third starts
    when the first ends, with fixed batches when both have ended."""

    class Counting(Engine):
        steps = 0

        def step(self) -> list[Generation]:
            self.steps += 1
            return super().step()

    model = random_model(n_px=8)
    x = serve.random_images(model, 3)
    requests = [serve.request(x[i], 32, pixels, seed=i) for i, pixels in enumerate((10, 30, 10))]
    engine = Counting(model, 2)
    report, generations = serve.serve_arrivals(engine, requests, np.zeros(3), continuous)
    assert engine.steps == (30 if continuous else 40)
    assert all(generation.finished for generation in generations)
    assert report["first_row_p99"] <= report["end_p99"]
