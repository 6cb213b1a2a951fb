"""Check every byte of a token store, and that its shards are what the source gives.

python jobs/verify.py --tokens s3://bucket/tokens
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("verify")
