"""Bias: are groups of pictures associated with attributes (iEAT), and are they finished differently?

python jobs/audit.py --release s3://bucket/runs/s1/release --ieat s3://bucket/stimuli/tests.json --out s3://bucket/audit
python jobs/audit.py --release s3://bucket/runs/s1/release --groups s3://bucket/faces --classifier s3://bucket/probe \
    --out s3://bucket/audit
"""

from igpt_ray.evaluate.config import AuditConfig
from igpt_ray.flows import job
from igpt_ray.flows.audit import run_audit

if __name__ == "__main__":
    job.run(run_audit, AuditConfig)
