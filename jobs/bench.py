"""How fast, how good, and beside what.

python jobs/bench.py palette --images FOLDER
python jobs/bench.py data --images FOLDER
"""

import json

import tyro

from igpt_ray.flows.bench.data import data
from igpt_ray.flows.bench.palette import palette

FLAT = (tyro.conf.OmitArgPrefixes,)  # --images, not --settings.images

if __name__ == "__main__":
    print(json.dumps(tyro.extras.subcommand_cli_from_dict({"palette": palette, "data": data}, config=FLAT)))
