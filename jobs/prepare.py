"""Turn a folder of images into a committed token store.

python jobs/prepare.py --source s3://bucket/imagenet --palette s3://bucket/palette.npy --tokens s3://bucket/tokens
"""

from igpt_ray.data.config import PrepareConfig
from igpt_ray.flows import job
from igpt_ray.flows.prepare import prepare

if __name__ == "__main__":
    job.run(prepare, PrepareConfig)
