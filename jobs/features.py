"""Write the features of every layer of a release to Parquet.

python jobs/features.py --release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/features
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("features")
