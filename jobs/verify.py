"""Verify every byte of a token store, and compare its shards with the source.

python jobs/verify.py --tokens s3://bucket/tokens
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("verify")
