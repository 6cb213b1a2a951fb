"""What a cloud tells a machine that it is about to take back: it answers on an address that only the machine can reach.

AWS gives two minutes (spot/instance-action) and at times a warning before (events/recommendations/rebalance), behind a
token of its own (IMDSv2). Google gives thirty seconds, and says no more than TRUE.
"""

import json
import time
import urllib.request
from datetime import datetime
from typing import NamedTuple
from urllib.error import HTTPError

from igpt_ray.errors import NotFound, StorageError

ENDPOINTS = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
TOKEN_SECONDS = 300
"""For which a token is asked; every look asks for a new one."""
GOOGLE_SECONDS = 30
"""Between a preemption's notice and the end."""


class Notice(NamedTuple):
    """The machine will go."""

    why: str
    deadline: float | None
    """Seconds since 1970; None if the cloud does not say."""


def look(cloud: str, endpoint: str, rebalance: bool = False) -> Notice | None:
    """The notice, if there is one; with `rebalance` AWS's earlier warning is one too.

    Raises `StorageError` where no metadata server of that cloud answers.
    """
    return _aws(endpoint, rebalance) if cloud == "aws" else _google(endpoint)


def _aws(endpoint: str, rebalance: bool) -> Notice | None:
    asking = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
    token = {"X-aws-ec2-metadata-token": _ask(f"{endpoint}/latest/api/token", asking, "PUT")}
    try:
        action = json.loads(_ask(f"{endpoint}/latest/meta-data/spot/instance-action", token))
        return Notice(f"spot {action['action']}", datetime.fromisoformat(action["time"]).timestamp())
    except NotFound:
        pass
    if rebalance:
        try:
            _ask(f"{endpoint}/latest/meta-data/events/recommendations/rebalance", token)
            return Notice("rebalance recommendation", None)
        except NotFound:
            pass
    return None


def _google(endpoint: str) -> Notice | None:
    said = _ask(f"{endpoint}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return Notice("preempted", time.time() + GOOGLE_SECONDS) if said.strip() == "TRUE" else None


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=5) as answer:
            return str(answer.read().decode())
    except HTTPError as error:
        if error.code == 404:
            raise NotFound(f"{url} says nothing") from error
        raise StorageError(
            f"{url} answered {error.code}: is this a machine of the cloud that --cloud names?"
        ) from error
    except OSError as error:
        raise StorageError(f"{url} does not answer: is this a machine of the cloud that --cloud names?") from error
