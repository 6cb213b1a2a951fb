"""Write the nats of every image of a split to Parquet.

python jobs/score.py --release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/scores
python jobs/score.py --endpoint http://127.0.0.1:8000 --source images --split train --out scores
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("score")
