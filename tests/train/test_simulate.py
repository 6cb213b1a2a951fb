"""The simulated step: calculations by hand, and bounds that hold for any order of events."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ray.train import simulate
from igpt_ray.train.config import ClusterConfig, EstimateConfig, PretrainConfig, WorkersConfig
from igpt_ray.train.estimate import estimate
from igpt_ray.train.presets import PRESETS
from igpt_ray.train.simulate import Group

FAST = {"node_gb_per_second": 1e12, "bus_gb_per_second": 1e12}


def of(
    preset: str, batch_size: int = 1024, cluster: dict[str, float] | None = None, **workers: int | str
) -> EstimateConfig:
    chosen = PRESETS[preset][1]
    sections = {name: getattr(chosen, name) for name in PretrainConfig.model_fields} | {
        "optim": chosen.optim.model_copy(update={"batch_size": batch_size}),
        "workers": WorkersConfig(precision="bfloat16", micro_batch="auto", **workers),
        "cluster": ClusterConfig(**(cluster or {})),
    }
    return EstimateConfig(**sections)


@pytest.mark.parametrize("preset", ["igpt-s", "igpt-l", "igpt-s-bert", "igpt-s-modern"])
@pytest.mark.parametrize("activation_checkpointing", ["none", "full"])
def test_a_single_worker_only_computes(preset: str, activation_checkpointing: str) -> None:
    """Its time equals the totals of the estimate."""
    found = simulate.step(of(preset, n=1, activation_checkpointing=activation_checkpointing))
    expected = of(preset, n=1, activation_checkpointing=activation_checkpointing)
    again = estimate(expected).step_seconds
    if activation_checkpointing == "full":  # only blocks are recomputed; the totals count a third of everything
        assert 0.97 * again < found["step_seconds"] <= again
    else:
        assert found["step_seconds"] == pytest.approx(again)
    assert (found["devices"], found["node_links"], found["network"]) == (pytest.approx(1), 0, 0)


def test_a_ring_by_hand() -> None:
    """64 workers on 8 nodes: 63 hops, 8 of them between nodes, and 63/64 of the bytes."""
    hops = 55 * 3.4e-6 + 8 * 14e-6
    assert Group(64, 8, 360).ring(1e9) == pytest.approx(8.4e-6 + hops + 63 / 64 * 1e9 / 360e9)
    assert Group(8, 1, 340).ring(0) == pytest.approx(8.4e-6 + 7 * 3.4e-6)
    assert Group(1, 1, 340).ring(1e9) == 0


def test_the_network_s_bytes_equal_the_totals() -> None:
    """Each gather and each reduction over replicas is counted once."""
    for shard in (None, 8, 64):
        settings = of("igpt-l", cluster={"mfu": 0.5}, n=64, shard=shard)
        found, totals = simulate.step(settings), estimate(settings)
        there, blocks = simulate.Topology.of(settings.workers, settings.cluster), settings.model.n_layer + 1
        hops = blocks * (3 * there.shards.ring(0) + 2 * there.replicas.ring(0))
        carried = (found["node_links"] + found["network"]) * found["step_seconds"]
        assert carried == pytest.approx(totals.traffic_seconds + hops, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(
    preset=st.sampled_from(["igpt-s", "igpt-l", "igpt-xl"]),
    nodes=st.integers(1, 32),
    copies=st.booleans(),
    bus=st.floats(1, 1000),
    batch=st.integers(256, 2048),
)
def test_a_step_takes_between_its_busiest_resource_and_the_sum_of_all(
    preset: str, nodes: int, copies: bool, bus: float, batch: int
) -> None:
    cluster = {"bus_gb_per_second": bus, "node_gb_per_second": 2 * bus}
    found = simulate.step(of(preset, batch, cluster, n=8 * nodes, shard=8 if copies else None))
    parts = [found["devices"], found["node_links"], found["network"]]
    assert max(parts) <= 1 + 1e-9
    assert sum(parts) >= 1 - 0.01  # the last sums, of a few bytes, are no part's work


def test_weights_are_prefetched_during_the_previous_block() -> None:
    """Without the prefetch, or if gradients blocked it, the step would take twice as long."""
    slow = of("igpt-l", cluster={"mfu": 0.4}, n=64)
    found = simulate.step(slow)
    assert found["devices"] + found["network"] > 1.2
    assert found["devices"] > 0.97


def test_replicas_need_less_of_the_network_than_rings_of_a_thousand_workers() -> None:
    """iGPT-XL on 1,024 H200s with one image each, as in docs/results.md."""
    by_sharing = {
        fsdp_size: simulate.step(of("igpt-xl", 1024, {"mfu": 0.5}, n=1024, shard=fsdp_size))
        for fsdp_size in (None, 8, 64)
    }
    assert by_sharing[None]["devices"] < 0.4
    assert 0.7 < by_sharing[8]["devices"] < 0.8
    assert by_sharing[64]["devices"] > 0.97
    hops = Group(1024, 128, math.inf).ring(0)
    assert 180 * hops > 0.8  # 60 blocks, gathered twice and reduced once: more than twice the work itself


def test_the_bottleneck_is_named() -> None:
    first = {
        (preset, batch, shard): simulate.bottleneck(simulate.sizes(of(preset, batch, {"mfu": 0.5}, n=8, shard=shard)))
        for preset, batch, shard in (("igpt-xl", 1024, None), ("igpt-xl", 1024, 8), ("igpt-s", 128, None))
    }
    assert first["igpt-xl", 1024, None] == "the network, with 1,024 workers"
    assert "batch" in simulate.bottleneck(simulate.sizes(of("igpt-xl", 64, FAST | {"mfu": 0.5}, n=8)))
    assert "node links" in simulate.bottleneck(simulate.sizes(of("igpt-s", 128, {"node_gb_per_second": 1}, n=8)))
    assert first["igpt-s", 128, None] == "the network, with 32 workers"


def test_more_workers_than_images_are_reported() -> None:
    (line,) = simulate.lines(of("igpt-xl", 64, n=128))
    assert line == "a batch of 64 has no image for each of 128 workers"


def test_input_and_checkpoint_traffic_of_a_node_by_hand() -> None:
    settings = of("igpt-xl", 1024, n=1024)
    node = simulate.node_io(settings, step_seconds=0.5)
    assert node["images_per_second"] == 1024 / 128 / 0.5
    assert node["mb_per_second"] == pytest.approx(16 * 4096 * 2 / 1e6)
    assert node["cache_gb"] == pytest.approx(1_281_167 * 8192 / 1e9)
    assert node["checkpoint_gb"] == pytest.approx(12 * 6_810_875_904 / 128 / 1e9)
    assert node["hours_between_failures"] == pytest.approx(48.8, abs=0.1)
