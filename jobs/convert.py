"""Carry weights from one format to another: OpenAI's, transformers', and our releases.

python jobs/convert.py --source s3://bucket/igpt-s/model.ckpt-1000000 --palette openai --out s3://bucket/igpt-s/release
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("convert")
