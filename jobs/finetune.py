"""Fine-tune a release with a class head on a labelled token store. Examples: docs/commands.md."""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("finetune")
