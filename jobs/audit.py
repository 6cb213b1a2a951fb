"""Audit the bias of a release: association tests (iEAT), and completions by group. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("audit")
