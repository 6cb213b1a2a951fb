"""Finish the lower half of pictures, and draw them.

python jobs/complete.py --release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/completions
python jobs/complete.py --release runs/s1/release --source pictures --split train --rows 20 --out done
"""

from igpt_ray.flows import job
from igpt_ray.flows.batch import complete
from igpt_ray.generate.config import CompleteConfig

if __name__ == "__main__":
    job.run(complete, CompleteConfig)
