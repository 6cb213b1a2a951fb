"""A run's second checkpoint, killed before each of its writes in turn, and the state of the run afterwards.

    python tests/support/killed_saving.py <root>

As `killed.py` for preparations: in <root>/<n> a child process saves step 1, then begins to save step 2, and kills
itself with SIGKILL right before its n-th write to the run's files. For each child a JSON line has that event, the
committed steps, the step that loads, and whether the loaded state is bit-identical to that step's.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist
from killed import Killer, in_child

from igpt_ray.train import checkpoint
from tests.train.test_checkpoint import Trainee, equal


def main(root: Path) -> None:
    n, killed = 0, True
    while killed:
        run = str(root / str(n))
        end, said = in_child(partial(doomed, run, n))
        killed = end == -signal.SIGKILL
        assert killed or end == 0, said
        # In a child too: a process with a process group, which has threads, must not fork.
        end, answer = in_child(partial(found, run))
        assert end == 0, answer
        print(json.dumps([said, *json.loads(answer)]), flush=True)
        n += 1


def doomed(run: str, n: int, writer: int) -> None:
    begin()
    trainee = Trainee(1).train(0).save(run, 1).train(1)
    saver = checkpoint.Saver(run, keep=1)
    sys.addaudithook(Killer(run, n, writer))
    trainee.begin(saver, 2)
    saver.finish()


def found(run: str, writer: int) -> None:
    begin()
    trainee = Trainee(2)
    manifest = trainee.load(run)
    step = manifest.step if manifest else 0
    whole = equal(trainee, Trainee(1).train(*range(step)))
    os.write(writer, json.dumps([checkpoint.committed_steps(run), step, whole]).encode())


def begin() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
