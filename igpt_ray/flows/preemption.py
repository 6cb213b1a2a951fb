"""Preemption notices from the metadata servers of AWS and Google Cloud.

AWS gives two minutes (spot/instance-action), sometimes after an earlier warning (events/recommendations/rebalance); its
requests need a token (IMDSv2). Google gives thirty seconds; its answer is TRUE or FALSE.
"""

import json
import time
import urllib.request
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple
from urllib.error import HTTPError

from igpt_ray.errors import NotFound, StorageError

ENDPOINTS = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
TOKEN_SECONDS = 300
"""Lifetime of a token; every poll requests a new one."""
GOOGLE_SECONDS = 30
"""Time from the notice to the end of the machine."""


class Notice(NamedTuple):
    """Notice that the machine will be preempted."""

    why: str
    deadline: float | None
    """Unix time in seconds; None if unknown."""


def poll(cloud: str, endpoint: str, rebalance: bool = False) -> Notice | None:
    """The current notice, or None. With `rebalance`, AWS's earlier warning counts as a notice.

    Raises `StorageError` if no metadata server of that cloud answers.
    """
    return _aws(endpoint, rebalance) if cloud == "aws" else _google(endpoint)


def _aws(endpoint: str, rebalance: bool) -> Notice | None:
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
    token = {"X-aws-ec2-metadata-token": _request(f"{endpoint}/latest/api/token", headers, "PUT")}
    with suppress(NotFound):
        action = json.loads(_request(f"{endpoint}/latest/meta-data/spot/instance-action", token))
        return Notice(f"spot {action['action']}", datetime.fromisoformat(action["time"]).timestamp())
    if rebalance:
        with suppress(NotFound):
            _request(f"{endpoint}/latest/meta-data/events/recommendations/rebalance", token)
            return Notice("rebalance recommendation", None)
    return None


def _google(endpoint: str) -> Notice | None:
    text = _request(f"{endpoint}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return Notice("preempted", time.time() + GOOGLE_SECONDS) if text.strip() == "TRUE" else None


def _request(url: str, headers: dict[str, str], method: str = "GET") -> str:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=5) as answer:
            return str(answer.read().decode())
    except HTTPError as error:
        if error.code == 404:
            raise NotFound(f"{url} does not exist") from error
        raise StorageError(
            f"{url} answered {error.code}: is this a machine of the cloud that --cloud names?"
        ) from error
    except OSError as error:
        raise StorageError(f"{url} does not answer: is this a machine of the cloud that --cloud names?") from error
