"""Serve releases over HTTP until interrupted, or check a file for `serve deploy`.

python jobs/serve.py --release s3://bucket/runs/s1/release --keys keys.txt --port 8000
python jobs/serve.py --check cluster/serve.yaml
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("serve")
