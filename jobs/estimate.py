"""What a run will take on a cluster: parameters, FLOPs, memory, traffic, hours, money; and what a larger one would wait
for. Starts nothing.

python jobs/estimate.py igpt-l --workers.n 64 --workers.precision bfloat16 --cluster.device h200 --cluster.price 4
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("estimate")
