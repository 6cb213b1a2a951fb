"""A run's second checkpoint, killed at every step of its storing, once at each, and what is found after that.

    python tests/killed_saving.py <root>

As `killed.py` for preparations: in <root>/<n> a child process saves step 1, then begins to save step 2, and kills
itself with SIGKILL right before the n-th step of that on the run's files. A JSON line for each tells what it was about
to do, which steps are committed, which one loads, and whether what loads is the state of that step to the last bit.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from killed import Killer
from test_checkpoint import Trainee, equal

from igpt_ray import checkpoint


def main(root: Path) -> None:
    n, killed = 0, True
    while killed:
        run = str(root / str(n))
        end, said = in_child(run, n)
        killed = end == -signal.SIGKILL
        assert killed or end == 0, said
        print(json.dumps([said, *found(run)]), flush=True)
        n += 1


def in_child(run: str, kill_before: int) -> tuple[int, str]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            begin()
            trainee = Trainee(1).train(0).save(run, 1).train(1)
            saver = checkpoint.Saver(run, keep=1)
            sys.addaudithook(Killer(run, kill_before, writer))
            trainee.begin(saver, 2)
            saver.finish()
            code = 0
        except BaseException as error:
            os.write(writer, repr(error).encode()[:500])
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def found(run: str) -> list[object]:
    """In a child too: a process with a process group, which has threads, must not fork."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        begin()
        trainee = Trainee(2)
        manifest = trainee.load(run)
        step = manifest.step if manifest else 0
        whole = equal(trainee, Trainee(1).train(*range(step)))
        os.write(writer, json.dumps([checkpoint.committed_steps(run), step, whole]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer: list[object] = json.loads(pipe.read())
    os.wait()
    return answer


def begin() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
