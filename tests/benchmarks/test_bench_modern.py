"""The comparison of recipes: it trains as training does, and counts to the crossing of two curves."""

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
    return BenchModernConfig(tokens=store.root, out=str(tmp_path / "found.json"), evaluate_every=2, **sizes)


def test_a_run_is_the_training_of_its_settings_and_is_done_once(settings: BenchModernConfig) -> None:
    """A schedule that is not applied, a held-out split that is trained on, a curve without its end; and an hour that
    is spent again because a table is wanted."""
    bench = modern.Bench(settings)
    found = bench.run("x", {"optim": {"lr": 0.01}}, seed=3)
    assert [step for step, _ in found["curve"]] == [2, 4, 5]
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
    assert found["nats"] == pytest.approx(image_nats(network, held_out, 4).mean() / 16, rel=1e-5)
    assert found["flops_per_step"] == 2 * 16 * estimate.flops_per_token(bench.model, causal=False)
    again = modern.Bench(settings).run("x", {"optim": {"lr": 0.01}}, seed=3)
    assert again["seconds"] == found["seconds"]


@pytest.mark.parametrize("start", [3.0, 12.0, 48.0])
def test_a_rate_is_tuned_until_it_gets_worse_on_both_sides(start: float) -> None:
    """A baseline whose best rate lies outside of what was tried would flatter the other recipe."""
    tried = []

    def nats(rate: float) -> float:
        tried.append(rate)
        return abs(rate - 13)

    assert modern.lowest(nats, start) == 12
    assert {6.0, 12.0, 24.0} <= set(tried)


def test_a_crossing_lies_on_the_line_between_two_looks() -> None:
    """The next look instead would round all gains down to a multiple of the looks; a worse curve never arrives."""
    curve = [(20, 3.0), (40, 2.0), (60, 1.0)]
    assert modern.reached(curve, 1.5) == 50
    assert modern.reached(curve, 2.0) == 40
    assert modern.reached(curve, 0.5) is None
    paper = {"nats": 2.0, "curve": [(20, 4.0), (40, 2.0)], "steps": 40, "flops_per_step": 10}
    better = {"nats": 1.0, "curve": curve, "steps": 60, "flops_per_step": 5}
    found = modern.summary([better, better], [paper, paper])
    assert (found["gain"], found["steps_to_paper"], found["times_fewer_flops"]) == (1.0, 40, 2.0)
    never = modern.summary([better], [paper | {"nats": 0.1}])
    assert never["times_fewer_flops"] is None
    assert "never" in modern.table({"row": never})[-1]


def test_later_changes_win() -> None:
    a, b = {"optim": {"lr": 1, "eps": 2}}, {"optim": {"lr": 3}, "model": {"n_px": 4}}
    assert modern.together(a, b) == {"optim": {"lr": 3, "eps": 2}, "model": {"n_px": 4}}
