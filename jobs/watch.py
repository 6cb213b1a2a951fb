"""Drain this node when its cloud announces that it will reclaim it. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("watch")
