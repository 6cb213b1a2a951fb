"""Fine-tune a release, with a class head, on a labelled token store that was prepared with a hold-out.

python jobs/finetune.py --release s3://bucket/runs/s1/release --tokens s3://bucket/cifar10 --run.root s3://bucket/runs
"""

from igpt_ray.flows import job
from igpt_ray.flows.finetune import finetune
from igpt_ray.train.config import FinetuneConfig

if __name__ == "__main__":
    job.run(finetune, FinetuneConfig)
