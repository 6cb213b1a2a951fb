"""One way to spread work over a cluster: small tasks, mapped by Ray Data actors that load once."""

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from igpt_ray.errors import IgptError
from igpt_ray.settings import PoolConfig

MAX_BLOCKS = 10_000
"""Blocks are what Ray Data schedules; beyond this many, each holds several tasks."""
PART = "ray-subcluster"
"""Nodes without this label are a part too: the one of work that needs GPUs."""


def actor_map(
    tasks: Sequence[Any], worker: Callable[..., Callable[[Any], Any]], arguments: dict[str, Any], pool: PoolConfig
) -> Iterator[Any]:
    """`worker(**arguments)` once per actor, then its result called with every task; yields what comes back, in order.

    As many actors as the cluster has room for, or can have: without GPUs only where the head is, if that is a part of
    the cluster. Tasks and results are any picklable objects. An error for the user ends the work and is raised here as
    itself: it travels as a result, because Ray's wrappers lose its type.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    where = {} if pool.gpus else _part_of_the_head()
    context.execution_options.label_selector = where or None
    actors = ray.data.ActorPoolStrategy(min_size=1, max_size=min(len(tasks), pool.size or len(tasks)))
    rows = [{"pickle": pickle.dumps(task)} for task in tasks]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
        _Actor,
        fn_constructor_args=(worker, arguments),
        compute=actors,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        label_selector=where,
    )
    for row in dataset.iter_rows():
        result = pickle.loads(row["pickle"])
        if isinstance(result, IgptError):
            raise result
        yield result


def _part_of_the_head() -> dict[str, str]:
    """The label of the head that Ray Data divides clusters by; empty if it has none, and any node will do.

    Where nodes with GPUs lack it, the autoscaler cannot start them for their CPUs when all others are taken. The kinds
    of nodes that it may start are nowhere to be asked for.
    """
    labels = next(node["Labels"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
    return {PART: labels[PART]} if PART in labels else {}


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
