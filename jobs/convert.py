"""Convert weights between OpenAI's checkpoints, transformers' folders and releases. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("convert")
