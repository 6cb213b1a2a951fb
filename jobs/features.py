"""Write the features of every layer of a release to Parquet. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("features")
