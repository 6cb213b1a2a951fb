"""Complete the lower half of images, and write the results as figures.

python jobs/complete.py --release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/completions
python jobs/complete.py --release runs/s1/release --source images --split train --rows 20 --out completions
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("complete")
