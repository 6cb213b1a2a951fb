"""Verify every byte of a token store, and compare its shards with the source. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("verify")
