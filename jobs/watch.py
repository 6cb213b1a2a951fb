"""Watch for the cloud's notice that it will reclaim this node, and drain the node. Runs on every worker node
(cluster/aws.yaml, cluster/gcp.yaml).

python jobs/watch.py --cloud aws --address 10.0.0.1:6379
"""

from igpt_ray.cli import run

if __name__ == "__main__":
    run("watch")
