"""Benchmark of recipes: its training equals that of the library, and it measures where two curves cross."""

from pathlib import Path

import pytest
import torch

from benchmarks import modern
from benchmarks.modern import BenchModernConfig
from igpt_ray.data.loader import SplitCache, global_batch
from igpt_ray.data.token_store import TokenStore
from igpt_ray.evaluate.likelihood import image_nats
from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train import estimate, optim
from igpt_ray.train.config import OptimConfig


@pytest.fixture
def settings(store: TokenStore, tmp_path: Path) -> BenchModernConfig:
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 1, "batch_size": 2, "steps": 5, "warmup_steps": 1}
    return BenchModernConfig(tokens=store.root, out=str(tmp_path / "results.json"), evaluate_every=2, **sizes)


def test_a_run_trains_with_its_settings_and_is_not_repeated(settings: BenchModernConfig) -> None:
    """The schedule is applied, the held-out split is not trained on, the curve includes the last step, and a second
    bench reads the stored result."""
    bench = modern.Bench(settings)
    result = bench.run("x", {"optim": {"lr": 0.01}}, seed=3)
    assert [step for step, _ in result["curve"]] == [2, 4, 5]
    torch.manual_seed(3)
    network, o = ImageGPT(bench.model), OptimConfig(lr=0.01, batch_size=2, steps=5, warmup_steps=1)
    optimizer = optim.build(network, o)
    for step in range(5):
        x = torch.from_numpy(bench.images[global_batch(3, step, 2, len(bench.images))]).long()
        optimizer.zero_grad()
        (losses.generative(network, x) / x.numel()).backward()
        optim.set_lr(optimizer, optim.lr_at(step, o))
        optimizer.step()
    held_out = SplitCache(TokenStore.open(settings.tokens), "test").views[0]
    assert result["nats"] == pytest.approx(image_nats(network, held_out, 4).mean() / 16, rel=1e-5)
    assert result["flops_per_step"] == 2 * 16 * estimate.flops_per_token(bench.model, causal=False)
    again = modern.Bench(settings).run("x", {"optim": {"lr": 0.01}}, seed=3)
    assert again["seconds"] == result["seconds"]


@pytest.mark.parametrize("start", [3.0, 12.0, 48.0])
def test_a_rate_is_tuned_until_the_loss_rises_on_both_sides(start: float) -> None:
    """A baseline whose best rate lies outside the range tried would favour the other recipe."""
    tried = []

    def nats(rate: float) -> float:
        tried.append(rate)
        return abs(rate - 13)

    assert modern.lowest(nats, start) == 12
    assert {6.0, 12.0, 24.0} <= set(tried)


def test_a_crossing_is_interpolated_between_two_evaluations() -> None:
    """Without interpolation, gains would be rounded down to whole intervals. A worse curve never crosses."""
    curve = [(20, 3.0), (40, 2.0), (60, 1.0)]
    assert modern.reached(curve, 1.5) == 50
    assert modern.reached(curve, 2.0) == 40
    assert modern.reached(curve, 0.5) is None
    paper = {"nats": 2.0, "curve": [(20, 4.0), (40, 2.0)], "steps": 40, "flops_per_step": 10}
    better = {"nats": 1.0, "curve": curve, "steps": 60, "flops_per_step": 5}
    result = modern.summary([better, better], [paper, paper])
    assert (result["gain"], result["steps_to_paper"], result["times_fewer_flops"]) == (1.0, 40, 2.0)
    never = modern.summary([better], [paper | {"nats": 0.1}])
    assert never["times_fewer_flops"] is None
    assert "never" in modern.table({"row": never})[-1]


def test_the_last_of_conflicting_changes_applies() -> None:
    a, b = {"optim": {"lr": 1, "eps": 2}}, {"optim": {"lr": 3}, "model": {"n_px": 4}}
    assert modern.merged(a, b) == {"optim": {"lr": 3, "eps": 2}, "model": {"n_px": 4}}
