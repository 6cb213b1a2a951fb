"""Convert a folder of images to a token store.

python jobs/prepare.py --source s3://bucket/imagenet --palette s3://bucket/palette.npy --tokens s3://bucket/tokens
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("prepare")
