"""Write a report on a release: one self-contained HTML page.

python jobs/report.py --release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/report
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("report")
