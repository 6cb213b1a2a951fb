"""Evaluate nats per token of a release on a split, and accuracy of a fine-tuned one. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("evaluate")
