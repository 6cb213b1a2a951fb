"""The frame of every command: join or start Ray, run the flow, print one JSON line, set the exit code.

Exit codes: 0 success; 1 an error for the user (one line on stderr) or a bug (a traceback); 2 invalid settings; 130
after Ctrl-C; 143 after SIGTERM.
"""

import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from pydantic import BaseModel

from igpt_ray.data.config import PrepareConfig
from igpt_ray.errors import IgptError, SettingError
from igpt_ray.flows.local_cluster import free_port
from igpt_ray.flows.ray_log import RayLog
from igpt_ray.interrupt import catch_sigterm
from igpt_ray.progress import LogHandler
from igpt_ray.settings import Result

S = TypeVar("S", bound=BaseModel)


OUTPUTS = {"out", "root"}
"""Names of the settings that hold URIs of output folders; `tokens` is one in preparation only."""
JOB_FOLDER = "/runtime_resources/working_dir_files/"
"""Part of the path of a submitted job's working directory, which Ray deletes with its session."""


def finish(flow: Callable[[S], Result | dict[str, Any]], settings: S, cluster: bool = True) -> None:
    """Run `flow` and print its result and its seconds as one JSON line. Exits with a code if the flow fails."""
    ray_log = RayLog() if cluster else None
    failed = True
    try:
        check_outputs(settings, os.getcwd())
        if ray_log is not None:
            connect(ray_log)
        started = time.perf_counter()
        result = flow(settings)
        line = result.line() if isinstance(result, Result) else result
        line.setdefault("seconds", round(time.perf_counter() - started, 2))
        failed = False
    except KeyboardInterrupt:
        failed = False
        raise
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        sys.exit(1)
    finally:
        if ray_log is not None:
            ray_log.close(failed)
    print(json.dumps(line), flush=True)


def check_outputs(settings: BaseModel, folder: str, prefix: str = "--") -> None:
    """Raise `SettingError` if a submitted job would write into its working directory, where results would be lost."""
    if JOB_FOLDER not in folder:
        return
    outputs = OUTPUTS | ({"tokens"} if isinstance(settings, PrepareConfig) else set())
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            check_outputs(value, folder, f"{prefix}{name}.")
        elif name in outputs and isinstance(value, str) and JOB_FOLDER in os.path.normpath(value):
            raise SettingError(
                f"{prefix}{name} is {value}, a folder of this job that Ray deletes: set it to an s3:// URI or to the"
                " absolute path of a folder that all nodes share"
            )


def connect(ray_log: RayLog | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start a cluster in this process.

    Never joins another cluster that happens to run on this machine. With `ray_log`, Ray's own messages go to its file.
    """
    if not ray.is_initialized():
        joined = os.environ.get("RAY_ADDRESS")
        if not joined:
            keep_token_private()
            _set_own_address()
        ray.init(address=joined or "local", logging_level="warning", configure_logging=ray_log is None)
        catch_sigterm()
        if ray_log is not None:
            ray_log.attach()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    log_to_stderr()


def _set_own_address() -> None:
    """Set the address by which the processes of the new cluster find it. Otherwise parts of Ray Train may connect to
    another cluster on this machine, and stop the workers of runs that are unknown there."""
    port = free_port()
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    os.environ["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"


def keep_token_private() -> None:
    """Create the authentication token with private permissions, because Ray would create it readable for all users."""
    if {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    with suppress(FileExistsError), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
        f.write(secrets.token_hex(32))
    path.chmod(0o600)


def log_to_stderr() -> None:
    """Log lines of igpt_ray to stderr, `12:34:56 message`. Workers call it too; Ray sends their stderr to the driver.

    Uses our logger instead of the root logger, which Ray configures on workers.
    """
    ours = logging.getLogger("igpt_ray")
    if not ours.handlers:
        handler = LogHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        ours.addHandler(handler)
    ours.setLevel(logging.INFO)


def user_error(error: BaseException | None) -> IgptError | None:
    """The `IgptError` inside Ray's wrappers, or None."""
    seen = set()
    pending = [error]
    while pending:
        e = pending.pop()
        if e is None or id(e) in seen:
            continue
        if isinstance(e, IgptError) and not hasattr(e, "cause"):  # Ray's wrapper inherits from its cause
            return e
        seen.add(id(e))
        pending += [e.__cause__, e.__context__, getattr(e, "cause", None), getattr(e, "controller_failure", None)]
        pending += list(getattr(e, "worker_failures", {}).values())
    return None
