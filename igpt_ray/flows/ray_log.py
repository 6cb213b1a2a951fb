"""Ray's own messages go to a file, which a command names if it fails; its stderr shows only our lines."""

import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from igpt_ray.flows.ray_compat import redirect_worker_output

OUR_LINE = re.compile(r"\d\d:\d\d:\d\d ")
"""Start of a line of `igpt_ray.progress.LogHandler`, which Ray sends from the workers to the driver."""


class RayLog:
    """Separates the lines that Ray sends to the driver: ours and the autoscaler's to stderr, all others to a file."""

    def __init__(self) -> None:
        name = f"igpt_ray-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        self.path = Path(tempfile.gettempdir(), name)
        self.file: TextIO = self.path.open("w", buffering=1)
        logger = logging.getLogger("ray")
        logger.handlers = [logging.StreamHandler(self.file)]  # `import ray` has added a handler for stderr
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").addHandler(logging.StreamHandler(self.file))

    def attach(self) -> None:
        """Take the place of Ray's printer of worker output. Called after ray.init()."""
        self.print_autoscaler = redirect_worker_output(self.handle)

    def handle(self, batch: dict[str, Any]) -> None:
        """`batch` holds lines of one process: `lines`, `pid`, and `actor_name` or `task_name`."""
        if batch["pid"] == "autoscaler":  # Ray's printer selects its events
            self.print_autoscaler(batch)
            return
        process = f"{batch.get('actor_name') or batch.get('task_name')} pid={batch['pid']}"
        for line in batch["lines"]:
            if OUR_LINE.match(line):
                tqdm.write(line, file=sys.stderr)
            else:
                print(f"({process}) {line}", file=self.file)

    def close(self, failed: bool) -> None:
        """Name the file after a failure, if it holds anything; delete it otherwise."""
        self.file.flush()
        if failed and self.path.stat().st_size:
            print(f"Ray's messages are in {self.path}", file=sys.stderr)
        else:
            self.path.unlink(missing_ok=True)
