"""The estimate of a run as a command: prints its arithmetic, starts nothing, and needs no cluster."""

from typing import Any

from igpt_ray.train import simulate
from igpt_ray.train.config import EstimateConfig
from igpt_ray.train.estimate import estimate, lines
from igpt_ray.train.parallelize import sharding_dry_run


def report(settings: EstimateConfig) -> dict[str, Any]:
    """Print memory, traffic, hours and money of a run, and the simulation of one step; returns the estimate."""
    found = estimate(settings)
    fewest, most = sharding_dry_run(settings.model, settings.workers)
    print("\n".join([*lines(settings, found), "", *simulate.lines(settings)]))
    print(f"the device mesh, built in this process without weights: a worker holds {fewest:,} to {most:,} parameters")
    return found
