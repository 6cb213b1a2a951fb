"""Serve a release over HTTP until interrupted.

python jobs/serve.py --release s3://bucket/runs/s1/release --port 8000
"""

from igpt_ray.config import Serve
from igpt_ray.flows import job, serve

if __name__ == "__main__":
    job.run(serve.run, Serve)
