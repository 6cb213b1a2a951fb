"""Serve releases over HTTP until interrupted, or check a file for `serve deploy`.

python jobs/serve.py --release s3://bucket/runs/s1/release --keys keys.txt --port 8000
python jobs/serve.py --check cluster/serve.yaml
"""

import tyro

from igpt_ray.config import Serve
from igpt_ray.flows import job, serve

if __name__ == "__main__":
    settings = tyro.cli(Serve)
    if settings.check:
        job.finish(serve.check_only, settings, cluster=False)
    else:
        job.finish(serve.run, settings)
