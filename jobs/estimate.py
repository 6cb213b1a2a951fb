"""Estimate a training run without starting it: parameters, FLOPs, memory, traffic, hours, cost and the bottlenecks
of a larger cluster.

python jobs/estimate.py igpt-l --workers.n 64 --workers.precision bfloat16 --cluster.device h200 --cluster.price 4
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("estimate")
