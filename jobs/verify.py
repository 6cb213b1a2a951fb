"""Check every byte of a token store, and that its shards are what the source gives.

python jobs/verify.py --tokens s3://bucket/tokens
"""

from igpt_ray.data.config import VerifyConfig
from igpt_ray.flows import job
from igpt_ray.flows.verify import verify

if __name__ == "__main__":
    job.run(verify, VerifyConfig)
