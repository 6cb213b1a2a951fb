"""Features of every layer of a release, to Parquet.

python jobs/features.py --release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/features
"""

from igpt_ray.evaluate.config import FeaturesConfig
from igpt_ray.flows import job
from igpt_ray.flows.features import extract

if __name__ == "__main__":
    job.run(extract, FeaturesConfig)
