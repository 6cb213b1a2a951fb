"""Linear probe of every layer of a release.

python jobs/probe.py --release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/probe
"""

from igpt_ray.evaluate.config import ProbeConfig
from igpt_ray.flows import job
from igpt_ray.flows.probe import probe_layers

if __name__ == "__main__":
    job.run(probe_layers, ProbeConfig)
