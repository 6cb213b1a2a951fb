"""An extraction of features that is killed before each of its writes in turn, and then repeated.

    python tests/support/killed_features.py '{"release": ..., "tokens": ..., ...}' <root>

As `killed.py` for preparations: for n = 0, 1, 2 ... a child process extracts into <root>/<n> and kills itself with
SIGKILL right before its n-th write there. For each child a JSON line has the event before which it died, the number of
units committed by then, the number computed by the repeat, and the sha256 of every file at the end.
"""

import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from killed import Killer, files_below, in_child

from igpt_ray.data.mapper import serial_map
from igpt_ray.evaluate.config import FeaturesConfig
from igpt_ray.flows import features


def main(settings: dict[str, Any], root: Path) -> None:
    features.actor_map = serial_map
    n, killed = 0, True
    while killed:
        made = FeaturesConfig.model_validate({**settings, "out": str(root / str(n))})
        end, said = in_child(partial(doomed, made, n))
        killed = end == -signal.SIGKILL
        lines = len(list(Path(made.out).glob("*/units/*.json")))
        report: dict[str, Any] = {}
        end, again = in_child(partial(repeated, made))
        report = json.loads(again) if end == 0 else {"units_made": again}
        print(json.dumps([said, lines, report["units_made"], files_below(made.out)]), flush=True)
        n += 1


def doomed(settings: FeaturesConfig, n: int, writer: int) -> None:
    sys.addaudithook(Killer(settings.out, n, writer))
    features.extract(settings)


def repeated(settings: FeaturesConfig, writer: int) -> None:
    import os

    os.write(writer, json.dumps(features.extract(settings).line()).encode())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
