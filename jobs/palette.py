"""Fit a palette to a folder of images. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("palette")
