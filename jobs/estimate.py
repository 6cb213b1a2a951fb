"""What a run will take on a cluster: parameters, FLOPs, memory, traffic, hours, money; and what a larger one would wait
for. Starts nothing.

python jobs/estimate.py igpt-l --workers.n 64 --workers.precision bfloat16 --cluster.device h200 --cluster.price 4
"""

import json
import sys

from igpt_ray.train import simulate
from igpt_ray.train.config import EstimateConfig
from igpt_ray.train.estimate import estimate, lines
from igpt_ray.train.parallelize import rehearsal
from igpt_ray.train.presets import preset_from_words

if __name__ == "__main__":
    settings = preset_from_words(sys.argv[1:], EstimateConfig)
    found = estimate(settings)
    fewest, most = rehearsal(settings.model, settings.workers)
    print("\n".join([*lines(settings, found), "", *simulate.lines(settings)]))
    print(f"the mesh, rehearsed in this process: a worker holds {fewest:,} to {most:,} parameters")
    print(json.dumps(found))
