"""Write the nats of every image of a split to Parquet. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("score")
