"""What every command does around its flow: join or start Ray, one JSON line on stdout, an exit code.

Exit codes: 0 done; 1 something the user can mend (one line on stderr) or a bug (a traceback); 2 settings refused.
"""

import json
import logging
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from pydantic import BaseModel

from igpt_ray.errors import IgptError
from igpt_ray.flows.local_cluster import free_port
from igpt_ray.progress import LogHandler

S = TypeVar("S", bound=BaseModel)


def finish(flow: Callable[[S], dict[str, Any]], settings: S, cluster: bool = True) -> None:
    try:
        if cluster:
            connect()
        report = flow(settings)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(report), flush=True)


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start one in this process.

    Never a cluster that merely happens to run on this machine.
    """
    if not ray.is_initialized():
        joined = os.environ.get("RAY_ADDRESS")
        if not joined:
            keep_token_private()
            _tell_own_processes()
        ray.init(address=joined or "local", logging_level="warning")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    log_to_stderr()


def _tell_own_processes() -> None:
    """Processes of the cluster that is started next find it by this; without, parts of Ray Train may take another one
    on the machine for theirs, and stop the workers of a run that is not known there."""
    port = free_port()
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    os.environ["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"


def keep_token_private() -> None:
    """Ray writes the token of a cluster on this machine for all to read: it shall find one that only we may read."""
    if {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    with suppress(FileExistsError), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
        f.write(secrets.token_hex(32))
    path.chmod(0o600)


def log_to_stderr() -> None:
    """Our own lines, `12:34:56 message`; also called on training workers, whose stderr Ray brings to the driver.

    On our logger, not the root's, which Ray configures on workers before we get there.
    """
    ours = logging.getLogger("igpt_ray")
    if not ours.handlers:
        handler = LogHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        ours.addHandler(handler)
    ours.setLevel(logging.INFO)


def user_error(error: BaseException | None) -> IgptError | None:
    """The error for the user inside what Ray wrapped around it, if there is one."""
    seen = set()
    pending = [error]
    while pending:
        e = pending.pop()
        if e is None or id(e) in seen:
            continue
        if isinstance(e, IgptError) and not hasattr(e, "cause"):  # Ray's wrapper inherits from the cause it wraps
            return e
        seen.add(id(e))
        pending += [e.__cause__, e.__context__, getattr(e, "cause", None)]
        pending += list(getattr(e, "worker_failures", {}).values())
    return None
