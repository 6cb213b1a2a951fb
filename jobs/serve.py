"""Serve releases over HTTP until interrupted, or check a file for `serve deploy`. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("serve")
