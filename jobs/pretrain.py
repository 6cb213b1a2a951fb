"""Pretrain ImageGPT on a token store, or resume a run. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("pretrain")
