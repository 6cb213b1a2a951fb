"""Fit a palette to a folder of images.

python jobs/palette.py --source s3://bucket/imagenet --out s3://bucket/palette.npy
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("palette")
