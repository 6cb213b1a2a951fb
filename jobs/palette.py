"""Fit a palette to a folder of images.

python jobs/palette.py --source s3://bucket/imagenet --out s3://bucket/palette.npy
"""

from igpt_ray.data.config import PaletteConfig
from igpt_ray.flows import job
from igpt_ray.flows.prepare import fit_palette

if __name__ == "__main__":
    job.run(fit_palette, PaletteConfig)
