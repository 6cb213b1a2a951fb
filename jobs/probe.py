"""Fit linear probes to every layer of a release.

python jobs/probe.py --release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/probe
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("probe")
