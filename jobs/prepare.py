"""Convert a folder of images to a token store. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("prepare")
