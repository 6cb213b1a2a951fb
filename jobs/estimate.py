"""What a run will take on a cluster: parameters, FLOPs, memory, traffic, hours, money. Starts nothing.

python jobs/estimate.py igpt-l --workers.n 64 --workers.precision bfloat16 --cluster.device h200 --cluster.price 4
"""

import json
import sys

from igpt_ray.config import Estimate, preset_from_words
from igpt_ray.estimate import estimate, lines

if __name__ == "__main__":
    settings = preset_from_words(sys.argv[1:], Estimate)
    found = estimate(settings)
    print("\n".join(lines(settings, found)))
    print(json.dumps(found))
