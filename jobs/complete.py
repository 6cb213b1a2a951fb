"""Complete the lower part of images, and draw figures. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("complete")
