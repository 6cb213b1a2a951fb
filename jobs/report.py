"""Write a report on a release: one self-contained HTML page. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("report")
