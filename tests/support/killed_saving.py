"""A run's second checkpoint, killed at every step of its storing, once at each, and what is found after that.

    python tests/support/killed_saving.py <root>

As `killed.py` for preparations: in <root>/<n> a child process saves step 1, then begins to save step 2, and kills
itself with SIGKILL right before the n-th step of that on the run's files. A JSON line for each tells what it was about
to do, which steps are committed, which one loads, and whether what loads is the state of that step to the last bit.
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
