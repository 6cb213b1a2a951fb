"""Pretrain ImageGPT on a token store. The first argument is a preset; the same name and settings resume a run.

python jobs/pretrain.py igpt-s --data.tokens s3://bucket/tokens --run.root s3://bucket/runs --run.name s1
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("pretrain")
