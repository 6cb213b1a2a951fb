"""Fit a linear probe to every layer of a release. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("probe")
