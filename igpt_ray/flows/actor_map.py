"""Distribute small tasks over a Ray cluster with Ray Data actors, each of which loads its worker once."""

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from igpt_ray.errors import IgptError
from igpt_ray.flows.ray_compat import head_labels
from igpt_ray.settings import PoolConfig

MAX_BLOCKS = 10_000
"""Most blocks, Ray Data's units of scheduling. With more tasks, a block holds several of them."""
PART = "ray-subcluster"
"""The node label that divides a cluster. GPU nodes do not have it."""


def actor_map(
    tasks: Sequence[Any], worker: Callable[..., Callable[[Any], Any]], arguments: dict[str, Any], pool: PoolConfig
) -> Iterator[Any]:
    """Call `worker(**arguments)` once per actor and its result once per task; yield the results in order of the tasks.

    The pool grows to as many actors as the cluster can hold. Without GPUs, actors are confined to the nodes with the
    head's `PART` label, if it has one. Tasks and results are any picklable objects. An `IgptError` in a worker ends the
    map and is raised here with its own type: it is returned as a result, because Ray's wrapping loses the type.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    selector = {} if pool.gpus else _head_label()
    context.execution_options.label_selector = selector or None
    actors = ray.data.ActorPoolStrategy(min_size=1, max_size=min(len(tasks), pool.size or len(tasks)))
    rows = [{"pickle": pickle.dumps(task)} for task in tasks]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
        _Actor,
        fn_constructor_args=(worker, arguments),
        compute=actors,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        label_selector=selector,
    )
    for row in dataset.iter_rows():
        result = pickle.loads(row["pickle"])
        if isinstance(result, IgptError):
            raise result
        yield result


def _head_label() -> dict[str, str]:
    """The head's `PART` label as a label selector; empty if it has none, so that any node matches.

    GPU nodes lack the label, so the autoscaler does not start them for their CPUs when all other nodes are busy. Ray
    has no API that lists the node types which the autoscaler may start.
    """
    labels = head_labels()
    return {PART: labels[PART]} if PART in labels else {}


class _Actor:
    """Creates the worker with the first task, so that errors of its constructor are returned like errors of tasks."""

    def __init__(self, worker: Callable[..., Callable[[Any], Any]], arguments: dict[str, Any]):
        self.worker = functools.cache(lambda: worker(**arguments))

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        try:
            result = self.worker()(pickle.loads(row["pickle"]))
        except IgptError as error:
            result = error
        return {"pickle": pickle.dumps(result)}
