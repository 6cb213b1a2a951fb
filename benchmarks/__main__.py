"""Speed and quality, measured next to the alternatives.

python -m benchmarks palette --images FOLDER
python -m benchmarks data --images FOLDER
python -m benchmarks corpus --images FOLDER FOLDER
python -m benchmarks identity --images cifar10 --tokens cifar10-tokens
python -m benchmarks modern --tokens demo-out/data/tokens --out modern.json
python -m benchmarks checkpoints
python -m benchmarks overheads --tokens demo-out/data/tokens
python -m benchmarks train --mingpt CHECKOUT
python -m benchmarks probe
python -m benchmarks features
python -m benchmarks serve
"""

import json

import tyro

from benchmarks.checkpoints import checkpoints
from benchmarks.corpus import corpus
from benchmarks.data import data
from benchmarks.features import features
from benchmarks.identity import identity
from benchmarks.modern import modern
from benchmarks.overheads import overheads
from benchmarks.palette import palette
from benchmarks.probe import probe
from benchmarks.serve import serve
from benchmarks.train import train

SUBJECTS = (palette, data, corpus, identity, checkpoints, overheads, modern, train, probe, features, serve)
FLAT = (tyro.conf.OmitArgPrefixes,)  # --images, not --settings.images

if __name__ == "__main__":
    subjects = {subject.__name__: subject for subject in SUBJECTS}
    print(json.dumps(tyro.extras.subcommand_cli_from_dict(subjects, config=FLAT)))
