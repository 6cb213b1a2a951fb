"""The comparison of samplers: all draw the same picture, and both kinds of batches serve the same requests."""

import numpy as np
import pytest
from conftest import random_model

from benchmarks import serve
from benchmarks.serve import BenchServeConfig
from igpt_ray.generate.engine import Engine, Generation

TINY = BenchServeConfig(
    n_layer=2, n_embd=32, n_head=2, n_px=8, pixels=20, batches=(1, 3), slots=2, requests=6, threads=1
)


def test_all_ways_draw_the_same_pixels() -> None:
    """A comparison with something that computes less, or from another half."""
    model = random_model(std=0.15, n_px=6)
    x = serve.pictures(model, 3)
    theirs = serve.transformers(model, "float32")(x, 10)
    assert theirs.shape == (3, 10)
    assert len(np.unique(theirs)) > 3
    assert (serve.ours(model, 3, "float32")(x, 10) == theirs).all()
    assert (serve.uncached(model.bfloat16().float())(x, 1) == theirs[:, :1]).mean() > 0.5


def test_the_report_has_every_figure() -> None:
    found = serve.serve(TINY)
    for batch in ("1", "3"):
        figures = found["batches"][batch]
        assert figures["same_tokens_as_transformers_float32"]["ours float32"] == 1
        assert all(rate > 0 for clock in ("wall", "cpu") for rate in figures[clock]["tokens_per_second"].values())
        assert set(figures["cpu"]["over_transformers"]) == {"ours float32", "ours bfloat16", "ours int8"}
    assert "without a cache, bfloat16" in found["batches"]["1"]["wall"]["tokens_per_second"]
    assert found["load"]["same_tokens"]
    assert 0 < found["quality"]["bfloat16"]["nats_lost"] < found["quality"]["int8"]["nats_lost"] < 0.1


@pytest.mark.parametrize("continuous", [True, False])
def test_a_batch_is_fixed_or_lets_others_in(continuous: bool) -> None:
    """Two kinds of batches that are one: of three requests for two slots, which come at once, and whose first is short,
    the third starts when the first ends, or when both have."""

    class Counting(Engine):
        steps = 0

        def step(self) -> list[Generation]:
            self.steps += 1
            return super().step()

    model = random_model(n_px=8)
    x = serve.pictures(model, 3)
    asked = [serve.request(x[i], 32, pixels, seed=i) for i, pixels in enumerate((10, 30, 10))]
    engine = Counting(model, 2)
    report, tickets = serve.attended_to(engine, asked, np.zeros(3), continuous)
    assert engine.steps == (30 if continuous else 40)
    assert all(ticket.finished for ticket in tickets)
    assert report["first_row_p99"] <= report["end_p99"]
