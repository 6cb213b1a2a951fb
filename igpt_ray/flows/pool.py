"""One way to spread work over a cluster: small tasks, mapped by Ray Data actors that load once."""

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from igpt_ray.config import Pool
from igpt_ray.errors import IgptError

MAX_BLOCKS = 10_000
"""Blocks are what Ray Data schedules; beyond this many, each holds several tasks."""


def spread(
    tasks: Sequence[Any], worker: Callable[..., Callable[[Any], Any]], arguments: dict[str, Any], pool: Pool
) -> Iterator[Any]:
    """`worker(**arguments)` once per actor, then its result called with every task; yields what comes back, in order.

    As many actors as the cluster has room for, or can have without starting GPUs for work that needs none. Tasks and
    results are any picklable objects. An error for the user ends the work and is raised here as itself: it travels as a
    result, because Ray's wrappers lose its type.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    room = _without_gpus(pool)
    limits = ray.data.ExecutionResources.for_limits(cpu=room * pool.cpus) if room else None
    context.execution_options.resource_limits = limits or ray.data.ExecutionResources.inf()
    fits = max(1, room - 1) if room else len(tasks)  # Ray Data asks for one CPU more than its actors have
    most = min(len(tasks), pool.size or fits)
    actors = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
    rows = [{"pickle": pickle.dumps(task)} for task in tasks]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
        _Actor, fn_constructor_args=(worker, arguments), compute=actors, num_cpus=pool.cpus, num_gpus=pool.gpus
    )
    for row in dataset.iter_rows():
        result = pickle.loads(row["pickle"])
        if isinstance(result, IgptError):
            raise result
        yield result


def _without_gpus(pool: Pool) -> int:
    """How many actors fit on the nodes without GPUs that an autoscaler may start; 0 if there is none, or no such nodes.

    Asked for more, it starts machines with eight GPUs for their CPUs.
    """
    cluster = ray._private.state.state.get_cluster_config()
    kinds = cluster.node_group_configs if cluster and not pool.gpus else []
    return sum(
        kind.max_count * int(kind.resources.get("CPU", 0) / pool.cpus)
        for kind in kinds
        if not kind.resources.get("GPU") and kind.max_count > 0
    )


class _Actor:
    """The worker is made with the first task rather than with the actor, so that its errors take the same way."""

    def __init__(self, worker: Callable[..., Callable[[Any], Any]], arguments: dict[str, Any]):
        self.make = functools.cache(lambda: worker(**arguments))

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        try:
            result = self.make()(pickle.loads(row["pickle"]))
        except IgptError as error:
            result = error
        return {"pickle": pickle.dumps(result)}
