"""Bias audit of a release: association tests (iEAT), and how completions differ between groups of images.

python jobs/audit.py --release s3://bucket/runs/s1/release --ieat s3://bucket/stimuli/tests.json --out s3://bucket/audit
python jobs/audit.py --release s3://bucket/runs/s1/release --groups s3://bucket/faces --classifier s3://bucket/probe \
    --out s3://bucket/audit
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("audit")
