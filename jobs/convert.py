"""Convert weights between formats: OpenAI checkpoints, transformers checkpoints and releases.

python jobs/convert.py --source s3://bucket/igpt-s/model.ckpt-1000000 --palette openai --out s3://bucket/igpt-s/release
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("convert")
