"""All uses of Ray's private names.

They connect to the GCS only. The public `ray.util.state` needs the dashboard, which a cluster may disable or bind to
the head's loopback address (as cluster/aws.yaml does). The command `ray drain-node` calls the same private method.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

from igpt_ray.errors import private_names_of

TRIED_ON = "2.60"


@private_names_of("ray", TRIED_ON)
def drain_node(address: str, node: str, reason: str, deadline_ms: int) -> tuple[bool, str]:
    """Drain a node that will be preempted. Returns whether the GCS accepts the request, and its reason if not.

    `address` is the GCS's, host:port. `deadline_ms` is a Unix time in milliseconds; 0 is no deadline.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    preemption = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, rejection = GcsClient(address=address).drain_node(node, preemption, reason, deadline_ms)
    return accepted, rejection


@private_names_of("ray", TRIED_ON)
def nodes_at(address: str, ip: str) -> list[str]:
    """The ids of the live nodes with this IP address, in the cluster whose GCS is at `address`."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    nodes = GcsClient(address=address).get_all_node_info(state_filter=GcsNodeInfo.GcsNodeState.ALIVE).values()
    return [info.node_id.hex() for info in nodes if info.node_manager_address == ip]


@private_names_of("ray", TRIED_ON)
def remove_placement_groups_of(actor_class: str) -> None:
    """Remove the placement groups that actors of this class created in this job."""
    import ray._private.state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    job, state = ray.get_runtime_context().get_job_id(), ray._private.state.state
    for data in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        creator = state.actor_table(group.creator_actor_id.hex())
        if creator.get("ActorClassName") == actor_class and group.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


@private_names_of("ray", TRIED_ON)
def head_labels() -> dict[str, str]:
    """The labels of the head node."""
    return next(node["Labels"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])


@private_names_of("ray", TRIED_ON)
def redirect_worker_output(handler: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Pass the lines that workers print to `handler` instead of Ray's printer, which is returned.

    Called after ray.init(). A batch has `lines`, `pid`, and `actor_name` or `task_name`.
    """
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
    from ray._private.worker import print_to_stdstream

    dispatcher.remove_handler("ray_print_logs")
    dispatcher.add_handler("igpt_ray", handler)
    return partial(print_to_stdstream, ignore_prefix=False)
