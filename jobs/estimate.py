"""Estimate memory, traffic, hours and cost of a training run. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("estimate")
