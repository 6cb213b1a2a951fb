"""How fast, how good, and beside what.

python jobs/bench.py palette --images FOLDER
python jobs/bench.py data --images FOLDER
python jobs/bench.py modern --tokens demo-out/data/tokens --out modern.json
python jobs/bench.py checkpoints
python jobs/bench.py overheads --tokens demo-out/data/tokens
python jobs/bench.py train --mingpt CHECKOUT
python jobs/bench.py probe
python jobs/bench.py features
python jobs/bench.py serve
"""

import json
from collections.abc import Callable
from typing import Any

import tyro

from igpt_ray.flows.bench.checkpoints import checkpoints
from igpt_ray.flows.bench.data import data
from igpt_ray.flows.bench.features import features
from igpt_ray.flows.bench.modern import modern
from igpt_ray.flows.bench.overheads import overheads
from igpt_ray.flows.bench.palette import palette
from igpt_ray.flows.bench.probe import probe
from igpt_ray.flows.bench.serve import serve
from igpt_ray.flows.bench.train import train

FLAT = (tyro.conf.OmitArgPrefixes,)  # --images, not --settings.images

if __name__ == "__main__":
    benches: dict[str, Callable[..., Any]] = {
        "palette": palette,
        "data": data,
        "checkpoints": checkpoints,
        "overheads": overheads,
        "modern": modern,
        "train": train,
        "probe": probe,
        "features": features,
        "serve": serve,
    }
    print(json.dumps(tyro.extras.subcommand_cli_from_dict(benches, config=FLAT)))
