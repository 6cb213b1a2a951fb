"""Distribute small tasks over a Ray cluster with Ray Data actors, each of which loads its worker once.

Ray Data repeats a task whose process dies, without a limit. `_Attempts` counts these deaths: after the first, the
images of the task are decoded in isolation, and after `MAX_DEATHS` the job ends with an error that names the task.
"""

import functools
import logging
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ray.data
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from igpt_ray.data import decoding
from igpt_ray.errors import IgptError, SourceError
from igpt_ray.flows.ray_compat import head_labels
from igpt_ray.settings import PoolConfig

log = logging.getLogger(__name__)

MAX_BLOCKS = 10_000
"""Most blocks, Ray Data's units of scheduling. With more tasks, a block holds several of them."""
MAX_DEATHS = 3
"""Processes that may die during one task. Deaths with their node are not counted."""
PART = "ray-subcluster"
"""The node label that divides a cluster. GPU nodes do not have it."""


def actor_map(
    tasks: Sequence[Any], worker: Callable[..., Callable[[Any], Any]], arguments: dict[str, Any], pool: PoolConfig
) -> Iterator[Any]:
    """Call `worker(**arguments)` once per actor and its result once per task; yield the results in order of the tasks.

    The pool grows to as many actors as the cluster can hold. Without GPUs, actors are confined to the nodes with the
    head's `PART` label, if it has one. Tasks and results are any picklable objects. An `IgptError` in a worker ends the
    map and is raised here with its own type: it is returned as a result, because Ray's wrapping loses the type. Raises
    `SourceError` if `MAX_DEATHS` processes died during one task.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    selector = {} if pool.gpus else _head_label()
    context.execution_options.label_selector = selector or None
    actors = ray.data.ActorPoolStrategy(min_size=1, max_size=min(len(tasks), pool.size or len(tasks)))
    rows = [{"index": i, "pickle": pickle.dumps(task)} for i, task in enumerate(tasks)]
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    attempts = ray.remote(**options)(_Attempts).remote()
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
        _Actor,
        fn_constructor_args=(worker, arguments, attempts),
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


class _Process(NamedTuple):
    """A worker process."""

    node: str
    id: str


class _Attempts:
    """Counts the processes that died during each task."""

    def __init__(self) -> None:
        self.running: dict[int, _Process] = {}
        """Task -> the process that started it last."""
        self.dead: dict[int, set[_Process]] = {}
        """Task -> processes that did not finish it, and have not started another task since."""

    def start(self, task: int, process: _Process) -> int:
        """Record that `process` runs `task`. Returns the number of processes that died during it on live nodes.

        A lost message may repeat a task although its process lives: a process that calls again has not died.
        """
        self._lives(process)
        before = self.running.get(task, process)
        if before != process and before.node in {n["NodeID"] for n in ray.nodes() if n["Alive"]}:
            self.dead.setdefault(task, set()).add(before)
        self.running[task] = process
        return len(self.dead.get(task, ()))

    def finish(self, task: int, process: _Process) -> None:
        self._lives(process)
        self.running.pop(task, None)

    def _lives(self, process: _Process) -> None:
        for processes in self.dead.values():
            processes.discard(process)


class _Actor:
    """Creates the worker with the first task, so that errors of its constructor are returned like errors of tasks."""

    def __init__(
        self, worker: Callable[..., Callable[[Any], Any]], arguments: dict[str, Any], attempts: ActorHandle[_Attempts]
    ):
        self.worker = functools.cache(lambda: worker(**arguments))
        self.attempts = attempts
        self.process = _Process(ray.get_runtime_context().get_node_id(), uuid.uuid4().hex)

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        index, task = int(row["index"]), pickle.loads(row["pickle"])
        deaths = ray.get(self.attempts.start.remote(index, self.process))
        try:
            result = self._result(task, deaths)
        except IgptError as error:
            result = error
        self.attempts.finish.remote(index, self.process)
        return {"pickle": pickle.dumps(result)}

    def _result(self, task: Any, deaths: int) -> Any:
        if not deaths:
            with decoding.time_limit():
                return self.worker()(task)
        if deaths >= MAX_DEATHS:
            raise SourceError(
                f"{deaths} worker processes died during {_name(task)}: see Ray's logs of the workers, and the memory of"
                " the nodes"
            )
        log.warning("a worker process died during %s: its images are now decoded in isolation", _name(task))
        with decoding.isolation():
            return self.worker()(task)


def _name(task: Any) -> str:
    """The name of a task for messages: a shard's path, a unit's split and name, or the start of its description."""
    unit = getattr(task, "unit", task)
    if (path := getattr(unit, "path", None)) is not None:
        return f"the shard {path}"
    return f"the unit {unit.split}/{unit.name}" if hasattr(unit, "split") else f"the task {repr(unit)[:100]}"
