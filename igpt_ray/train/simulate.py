"""A training step on a large cluster, event by event: what waits for what, and which part is full first.

`estimate.py` divides totals. Here every block is gathered one block ahead (as FSDP2 prefetches), its passes wait for
its weights, its gradient is summed over the workers that share the weights and then over the copies (HSDP), and every
link carries one thing at a time. All workers are alike, so one stands for all: there are no stragglers.

Collectives are rings, whose time is what NCCL itself reckons with (`src/graph/tuning.cc`, protocol Simple): a start,
a hop for each other member, and the bytes over the bus. All-reduces of a few bytes are trees. The hops are what a ring
over a thousand workers spends its time on.
"""

import math
from dataclasses import dataclass
from typing import Any

from igpt_ray.train.config import ClusterConfig, EstimateConfig, WorkersConfig
from igpt_ray.train.estimate import DEVICES, GB, buses, flops_per_token, images_per_pass, muon_flops, width_of

START, NODE_HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 14e-6
"""Seconds: to start a collective, for a hop inside a node, and for one between nodes."""
BUSY = 0.9
"""A part that works this share of a step is called full."""
COUNTS = 11
"""Cluster sizes of a table: 1, 2, 4 ... 1,024 nodes."""


@dataclass
class Stream:
    """Something that does one thing at a time, in the order asked."""

    free: float = 0.0
    busy: float = 0.0

    def do(self, ready: float, seconds: float) -> float:
        """When it is done, if it may not begin before `ready`."""
        self.free = max(self.free, ready) + seconds
        self.busy += seconds
        return self.free


@dataclass(frozen=True)
class Group:
    """Workers that take part in a collective: `members`, on `nodes` nodes, over a bus."""

    members: int
    nodes: int
    gb_per_second: float

    def ring(self, n_bytes: float) -> float:
        """Seconds to gather `n_bytes`, or to reduce as many to a share each."""
        if self.members == 1:
            return 0.0
        between = self.nodes if self.nodes > 1 else 0
        hops = between * NETWORK_HOP + (self.members - 1 - between) * NODE_HOP
        return START + hops + n_bytes * (self.members - 1) / self.members / (self.gb_per_second * GB)

    def tree(self) -> float:
        """Seconds for a sum of a few bytes, there and back."""
        if self.members == 1:
            return 0.0
        here = math.ceil(self.members / self.nodes) - 1
        return START + 2 * (here * NODE_HOP + math.ceil(math.log2(self.nodes)) * NETWORK_HOP)


@dataclass(frozen=True)
class Topology:
    """How workers hang together: those that share the weights, those that hold the same share of them, all."""

    fsdp_size: Group
    copies: Group
    everyone: Group

    @classmethod
    def of(cls, workers: WorkersConfig, cluster: ClusterConfig) -> "Topology":
        here = cluster.devices_per_node
        nodes, n_copies = math.ceil(workers.n / here), workers.n // workers.fsdp_size
        bus, bus_between = buses(workers, cluster)
        return cls(
            fsdp_size=Group(workers.fsdp_size, math.ceil(workers.fsdp_size / here), bus),
            copies=Group(n_copies, min(nodes, n_copies), bus_between),
            everyone=Group(workers.n, nodes, cluster.bus_gb_per_second),
        )


def step(settings: EstimateConfig) -> dict[str, Any]:
    """One step: its seconds, how long of that the devices compute, and what share of it every link is busy."""
    model, optim, workers = settings.model, settings.optim, settings.workers
    there = Topology.of(workers, settings.cluster)
    flops_per_second = DEVICES[settings.cluster.device].tflops * 1e12 * settings.cluster.mfu
    _, passes = images_per_pass(settings)
    share = math.ceil(optim.batch_size / workers.n) / passes  # on average: passes differ by an image at most
    block_params = 12 * model.n_embd**2 + 2 * model.n_embd
    other_params = model.n_params - model.n_layer * block_params
    forward = share * model.n_positions * flops_per_token(model, causal=True) / 3 / flops_per_second
    head = forward * 2 * model.n_vocab * model.n_embd * 3 / flops_per_token(model, causal=True)
    block = (forward - head) / model.n_layer
    again = block if workers.activation_checkpointing == "full" else 0.0

    device, fsdp_size = Stream(), Stream()
    inside = there.fsdp_size.nodes == 1
    between = Stream() if inside else fsdp_size  # what carries the sums over copies
    gather, reduce = (there.fsdp_size.ring(block_params * width) for width in (width_of(workers), 4))

    def summed(ready: float, seconds: float, n_params: int) -> None:
        """A gradient, first to the workers that own its shares, then over the copies of a share, twice around."""
        done = fsdp_size.do(ready, seconds)
        if there.copies.members > 1:
            between.do(done, 2 * there.copies.ring(4 * n_params / there.fsdp_size.members))

    def blocks(seconds: float, last_pass: bool = False) -> None:
        ready = fsdp_size.do(device.free, gather)
        for i in range(model.n_layer):
            begun = max(device.free, ready)
            coming = fsdp_size.do(begun, gather) if i < model.n_layer - 1 else 0.0
            done = device.do(ready, seconds)
            if last_pass:
                summed(done, reduce, block_params)
            ready = coming

    device.do(fsdp_size.do(0.0, there.fsdp_size.ring(other_params * width_of(workers))), 0.0)
    for i in range(passes):
        blocks(block)
        device.do(0.0, 3 * head)  # there and back
        blocks(2 * block + again, last_pass=i == passes - 1)
    summed(device.free, there.fsdp_size.ring(4 * other_params), other_params)
    end = max(device.free, fsdp_size.free, between.free) + 3 * there.everyone.tree()
    if optim.muon_lr is not None:
        end = device.do(end, muon_flops(model) / flops_per_second / workers.n)
    return {
        "workers": workers.n,
        "step_seconds": end,
        "devices": device.busy / end,
        "node_links": fsdp_size.busy / end if inside else 0.0,
        "network": between.busy / end,
        "tokens_per_second": round(optim.batch_size * model.n_positions / end),
    }


def fits(settings: EstimateConfig) -> bool:
    """Whether there is an image for every worker in every step."""
    return settings.optim.batch_size >= settings.workers.n


def sizes(settings: EstimateConfig) -> list[dict[str, Any]]:
    """The same run on clusters of 1, 2, 4 ... nodes, as long as every worker has an image of the batch."""
    found = []
    for nodes in (2**i for i in range(COUNTS)):
        n = nodes * settings.cluster.devices_per_node
        fsdp_size = math.gcd(n, settings.workers.shard) if settings.workers.shard else None
        workers = settings.workers.model_copy(update={"n": n, "shard": fsdp_size})
        other = settings.model_copy(update={"workers": workers})
        if fits(other):
            found.append(step(other))
    return found


def full_first(found: list[dict[str, Any]]) -> str:
    """What a larger cluster would wait for: on the smallest that leaves its devices idle, the part that is fullest."""
    for size in found:
        if size["devices"] < BUSY:
            part = max(("node_links", "network"), key=lambda name: size[name])
            return f"the {part.replace('_', ' ')}, with {size['workers']:,} workers"
    return f"the batch, with {2 * found[-1]['workers']:,} workers: more of them than images"


def with_images(settings: EstimateConfig, step_seconds: float) -> dict[str, float]:
    """What a node reads and writes beside its steps."""
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
    """What a step waits for, on this cluster and on others; and what happens beside the steps."""
    if not fits(settings):
        return [f"a batch of {settings.optim.batch_size} has no image for each of {settings.workers.n:,} workers"]
    here, others = step(settings), sizes(settings)
    node = with_images(settings, here["step_seconds"])
    table = [f"{'workers':>10} {'step':>10} {'devices':>10} {'node links':>10} {'network':>10} {'tokens/s':>14}"]
    for size in [*others, here] if here["workers"] not in {size["workers"] for size in others} else others:
        shares = " ".join(f"{size[part]:10.0%}" for part in ("devices", "node_links", "network"))
        mark = "  <-" if size["workers"] == here["workers"] else ""
        table.append(
            f"{size['workers']:10,} {size['step_seconds']:8.3g} s {shares} {size['tokens_per_second']:14,}{mark}"
        )
    return [
        "simulated, with what waits for what, and the share of a step that each part is busy:",
        *table,
        f"full first: {full_first(others)}",
        f"each node reads {node['images_per_second']:.3g} images/s ({node['mb_per_second']:.2g} MB/s) from its cache of"
        f" {node['cache_gb']:.3g} GB a view, filled in {node['fill_seconds']:.3g} s",
        f"each node stores {node['checkpoint_gb']:.3g} GB of a checkpoint in {node['checkpoint_seconds']:.3g} s; a"
        f" failure every {node['hours_between_failures']:.3g} h",
    ]
