"""Draining of a node that its cloud will preempt: Ray starts nothing new on it, and training saves.

Ray's autoscaler does not poll AWS or Google. One watcher runs on every worker node.
"""

import logging
import os
import time

import ray.util

from igpt_ray.errors import SettingError, StorageError
from igpt_ray.flows import preemption
from igpt_ray.flows.config import WatchConfig
from igpt_ray.flows.job import log_to_stderr
from igpt_ray.flows.ray_compat import drain_node, nodes_at
from igpt_ray.settings import Result

log = logging.getLogger(__name__)


class WatchResult(Result):
    node: str
    """Id of the Ray node."""
    notice: str
    seconds: float | None
    """From the notice to the preemption; None if the cloud does not state it."""
    accepted: bool
    """Whether Ray drains the node."""
    why_not: str


def watch(settings: WatchConfig) -> WatchResult:
    """Poll until there is a preemption notice, then drain the node. Returns the notice and Ray's answer."""
    log_to_stderr()
    address = settings.address or os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise SettingError("--address is not set: set it to the head's address, host:port, as for `ray start`")
    node = settings.node or _this_node(address)
    endpoint = settings.metadata or preemption.ENDPOINTS[settings.cloud]
    notice = preemption.poll(settings.cloud, endpoint, settings.rebalance)  # an error of the first poll is the user's
    while notice is None:
        time.sleep(settings.every)
        try:
            notice = preemption.poll(settings.cloud, endpoint, settings.rebalance)
        except StorageError as error:
            log.warning("%s", error)
    seconds = None if notice.deadline is None else max(0.0, notice.deadline - time.time())
    log.warning("%s: draining node %s%s", notice.why, node, "" if seconds is None else f", {seconds:.0f} s left")
    milliseconds = 0 if notice.deadline is None else int(notice.deadline * 1000)  # 0: no deadline
    accepted, why_not = drain_node(address, node, f"{settings.cloud}: {notice.why}", milliseconds)
    return WatchResult(node=node, notice=notice.why, seconds=seconds, accepted=accepted, why_not=why_not)


def _this_node(address: str) -> str:
    """The id of the Ray node at this machine's address."""
    ip = ray.util.get_node_ip_address()
    alive = nodes_at(address, ip)
    if len(alive) != 1:
        raise SettingError(f"{len(alive)} nodes have the address {ip}, expected one: set --node")
    return alive[0]
