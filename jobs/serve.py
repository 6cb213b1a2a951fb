"""Serve releases over HTTP until interrupted, or check a file for `serve deploy`.

python jobs/serve.py --release s3://bucket/runs/s1/release --keys keys.txt --port 8000
python jobs/serve.py --check cluster/serve.yaml
"""

import tyro

from igpt_ray.flows import job, serve
from igpt_ray.serve.config import ServeConfig

if __name__ == "__main__":
    settings = tyro.cli(ServeConfig)
    if settings.check:
        job.finish(serve.check_only, settings, cluster=False)
    else:
        job.finish(serve.run, settings)
