"""Discrete-event simulation of a training step on a large cluster: waiting times and bottleneck.

`estimate.py` divides totals. The simulation models the order of events: a block's weights are gathered one block ahead
(FSDP2's prefetch), its passes wait for them, its gradient is reduced within the FSDP group and then over the replicas
(HSDP), and a link carries one collective at a time. All workers are equal, so that one is simulated, without
stragglers.

Collectives are rings with the times of NCCL's own model (`src/graph/tuning.cc`, protocol Simple): a start, a hop per
further member, and the bytes over the bus. All-reduces of a few bytes are trees. In a ring over a thousand workers, the
hops take most of the time.
"""

import math
from dataclasses import dataclass
from typing import Any

from igpt_ray.train.config import ClusterConfig, EstimateConfig, WorkersConfig
from igpt_ray.train.estimate import DEVICES, GB, buses, flops_per_token, images_per_pass, muon_flops, width_of

START, NODE_HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 14e-6
"""Seconds to start a collective, of a hop within a node, and of a hop between nodes."""
BUSY = 0.9
"""Devices that compute for less than this share of a step count as waiting."""
COUNTS = 11
"""Number of cluster sizes in the table: 1, 2, 4 ... 1,024 nodes."""


@dataclass
class Stream:
    """A device or link, which runs one operation at a time, first come first served."""

    free: float = 0.0
    busy: float = 0.0

    def do(self, ready: float, seconds: float) -> float:
        """Run an operation that may start at `ready`. Returns its end."""
        self.free = max(self.free, ready) + seconds
        self.busy += seconds
        return self.free


@dataclass(frozen=True)
class Group:
    """The workers of a collective: their number, the number of their nodes, and the bandwidth of the bus."""

    members: int
    nodes: int
    gb_per_second: float

    def ring(self, n_bytes: float) -> float:
        """Seconds of an all-gather or a reduce-scatter of `n_bytes` in total."""
        if self.members == 1:
            return 0.0
        between = self.nodes if self.nodes > 1 else 0
        hops = between * NETWORK_HOP + (self.members - 1 - between) * NODE_HOP
        return START + hops + n_bytes * (self.members - 1) / self.members / (self.gb_per_second * GB)

    def tree(self) -> float:
        """Seconds of an all-reduce of a few bytes."""
        if self.members == 1:
            return 0.0
        local_hops = math.ceil(self.members / self.nodes) - 1
        return START + 2 * (local_hops * NODE_HOP + math.ceil(math.log2(self.nodes)) * NETWORK_HOP)


@dataclass(frozen=True)
class Topology:
    """A worker's FSDP group, the replicas of its shard, and all workers."""

    shards: Group
    replicas: Group
    all: Group

    @classmethod
    def of(cls, workers: WorkersConfig, cluster: ClusterConfig) -> "Topology":
        nodes, n_replicas = math.ceil(workers.n / cluster.devices_per_node), workers.n // workers.fsdp_size
        shard_bus, replica_bus = buses(workers, cluster)
        return cls(
            shards=Group(workers.fsdp_size, math.ceil(workers.fsdp_size / cluster.devices_per_node), shard_bus),
            replicas=Group(n_replicas, min(nodes, n_replicas), replica_bus),
            all=Group(workers.n, nodes, cluster.bus_gb_per_second),
        )


def step(settings: EstimateConfig) -> dict[str, Any]:
    """Simulate one step. Returns its seconds, and the share of them in which the devices and each link are busy."""
    model, optim, workers = settings.model, settings.optim, settings.workers
    topology = Topology.of(workers, settings.cluster)
    flops_per_second = DEVICES[settings.cluster.device].tflops * 1e12 * settings.cluster.mfu
    _, passes = images_per_pass(settings)
    share = math.ceil(optim.batch_size / workers.n) / passes  # average, because passes differ by at most an image
    block_params = 12 * model.n_embd**2 + 2 * model.n_embd
    other_params = model.n_params - model.n_layer * block_params
    forward = share * model.n_positions * flops_per_token(model, causal=True) / 3 / flops_per_second
    head = forward * 2 * model.n_vocab * model.n_embd * 3 / flops_per_token(model, causal=True)
    block = (forward - head) / model.n_layer
    recompute = block if workers.activation_checkpointing == "full" else 0.0

    shards, replicas = topology.shards, topology.replicas
    device, shard_link = Stream(), Stream()
    in_node = shards.nodes == 1
    replica_link = Stream() if in_node else shard_link
    gather, reduce = (shards.ring(block_params * width) for width in (width_of(workers), 4))

    def reduce_gradient(ready: float, seconds: float, n_params: int) -> None:
        """Reduce-scatter in the FSDP group, then all-reduce (two rings) over the replicas."""
        done = shard_link.do(ready, seconds)
        if replicas.members > 1:
            replica_link.do(done, 2 * replicas.ring(4 * n_params / shards.members))

    def run_blocks(seconds: float, last_pass: bool = False) -> None:
        ready = shard_link.do(device.free, gather)
        for i in range(model.n_layer):
            start = max(device.free, ready)
            next_ready = shard_link.do(start, gather) if i < model.n_layer - 1 else 0.0
            done = device.do(ready, seconds)
            if last_pass:
                reduce_gradient(done, reduce, block_params)
            ready = next_ready

    device.do(shard_link.do(0.0, shards.ring(other_params * width_of(workers))), 0.0)
    for i in range(passes):
        run_blocks(block)
        device.do(0.0, 3 * head)  # forward and backward
        run_blocks(2 * block + recompute, last_pass=i == passes - 1)
    reduce_gradient(device.free, shards.ring(4 * other_params), other_params)
    end = max(device.free, shard_link.free, replica_link.free) + 3 * topology.all.tree()
    if optim.muon_lr is not None:
        end = device.do(end, muon_flops(model) / flops_per_second / workers.n)
    return {
        "workers": workers.n,
        "step_seconds": end,
        "devices": device.busy / end,
        "node_links": shard_link.busy / end if in_node else 0.0,
        "network": replica_link.busy / end,
        "tokens_per_second": round(optim.batch_size * model.n_positions / end),
    }


def fits(settings: EstimateConfig) -> bool:
    """Whether the batch has an image for every worker."""
    return settings.optim.batch_size >= settings.workers.n


def sizes(settings: EstimateConfig) -> list[dict[str, Any]]:
    """The simulated step on clusters of 1, 2, 4 ... nodes, as far as every worker has an image of the batch."""
    steps = []
    for nodes in (2**i for i in range(COUNTS)):
        n = nodes * settings.cluster.devices_per_node
        fsdp_size = math.gcd(n, settings.workers.shard) if settings.workers.shard else None
        workers = settings.workers.model_copy(update={"n": n, "shard": fsdp_size})
        other = settings.model_copy(update={"workers": workers})
        if fits(other):
            steps.append(step(other))
    return steps


def bottleneck(steps: list[dict[str, Any]]) -> str:
    """The busiest link of the smallest cluster whose devices wait; the batch if there is no such cluster."""
    for size in steps:
        if size["devices"] < BUSY:
            part = max(("node_links", "network"), key=lambda name: size[name])
            return f"the {part.replace('_', ' ')}, with {size['workers']:,} workers"
    return f"the batch, which is smaller than {2 * steps[-1]['workers']:,} workers"


def node_io(settings: EstimateConfig, step_seconds: float) -> dict[str, float]:
    """Images and checkpoints that a node reads and writes, and the time between failures of the cluster."""
    model, cluster = settings.model, settings.cluster
    nodes = math.ceil(settings.workers.n / cluster.devices_per_node)
    images_per_second = settings.optim.batch_size / nodes / step_seconds
    view, checkpoint = 2 * cluster.images * model.n_positions / GB, 12 * model.n_params / nodes / GB
    return {
        "images_per_second": images_per_second,
        "mb_per_second": 2 * images_per_second * model.n_positions / 1e6,
        "cache_gb": view,
        "fill_seconds": view / cluster.store_gb_per_second,
        "checkpoint_gb": checkpoint,
        "checkpoint_seconds": checkpoint / cluster.store_gb_per_second,
        "hours_between_failures": cluster.failure_hours / settings.workers.n,
    }


def lines(settings: EstimateConfig) -> list[str]:
    """The simulated step on this cluster and on other sizes, and the I/O of a node."""
    if not fits(settings):
        return [f"a batch of {settings.optim.batch_size} has no image for each of {settings.workers.n:,} workers"]
    this, others = step(settings), sizes(settings)
    node = node_io(settings, this["step_seconds"])
    table = [f"{'workers':>10} {'step':>10} {'devices':>10} {'node links':>10} {'network':>10} {'tokens/s':>14}"]
    for size in [*others, this] if this["workers"] not in {size["workers"] for size in others} else others:
        shares = " ".join(f"{size[part]:10.0%}" for part in ("devices", "node_links", "network"))
        mark = "  <-" if size["workers"] == this["workers"] else ""
        table.append(
            f"{size['workers']:10,} {size['step_seconds']:8.3g} s {shares} {size['tokens_per_second']:14,}{mark}"
        )
    return [
        "simulation of a step, with the share of it in which each part is busy:",
        *table,
        f"bottleneck: {bottleneck(others)}",
        f"each node reads {node['images_per_second']:.3g} images/s ({node['mb_per_second']:.2g} MB/s) from its cache of"
        f" {node['cache_gb']:.3g} GB a view, filled in {node['fill_seconds']:.3g} s",
        f"each node stores {node['checkpoint_gb']:.3g} GB of a checkpoint in {node['checkpoint_seconds']:.3g} s; a"
        f" failure every {node['hours_between_failures']:.3g} h",
    ]
