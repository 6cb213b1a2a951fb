"""All that can be said of a release, on one page that opens without a network.

python jobs/report.py --release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/report
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("report")
