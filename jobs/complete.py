"""Finish the lower half of pictures, and draw them.

python jobs/complete.py --release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/completions
python jobs/complete.py --release runs/s1/release --source pictures --split train --rows 20 --out done
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("complete")
