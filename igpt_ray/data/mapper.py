"""How preparation and verification distribute their tasks: the caller passes a function with this signature.

`flows.actor_map.actor_map` runs the tasks on a Ray cluster; `serial_map` runs them in this process.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from igpt_ray.settings import PoolConfig

Worker = Callable[..., Callable[[Any], Any]]
Mapper = Callable[[Sequence[Any], Worker, dict[str, Any], PoolConfig], Iterator[Any]]
"""Calls `worker(**arguments)(task)` for every task, and yields the results in the order of the tasks."""


def serial_map(tasks: Sequence[Any], worker: Worker, arguments: dict[str, Any], pool: PoolConfig) -> Iterator[Any]:
    """One worker in this process handles all tasks; `pool` is not used."""
    yield from map(worker(**arguments), tasks)
