"""The command `estimate`, which needs no cluster."""

from igpt_ray.train import simulate
from igpt_ray.train.config import EstimateConfig
from igpt_ray.train.estimate import Estimate, estimate, lines
from igpt_ray.train.parallelize import sharding_dry_run


def report(settings: EstimateConfig) -> Estimate:
    """Print memory, traffic, hours and cost of a run, and the simulation of one step. Returns the estimate."""
    result = estimate(settings)
    fewest, most = sharding_dry_run(settings.model, settings.workers)
    print("\n".join([*lines(settings, result), "", *simulate.lines(settings)]))
    print(f"sharding dry run on tensors without memory: {fewest:,} to {most:,} parameters per worker")
    return result
