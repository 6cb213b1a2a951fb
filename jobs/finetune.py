"""Fine-tune a release with a class head on a labelled token store that has a hold-out split.

python jobs/finetune.py --release s3://bucket/runs/s1/release --tokens s3://bucket/cifar10 --run.root s3://bucket/runs
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("finetune")
