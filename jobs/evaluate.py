"""Evaluate the nats per token of a release on a split, and the accuracy of a fine-tuned one.

python jobs/evaluate.py --release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --split test
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("evaluate")
