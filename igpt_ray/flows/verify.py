"""Verification of a token store on a Ray cluster: `data.verify` does the work, and Ray Data distributes it."""

from typing import Any

from igpt_ray.data import verify as verification
from igpt_ray.data.config import VerifyConfig
from igpt_ray.flows.actor_map import actor_map


def verify(settings: VerifyConfig) -> dict[str, Any]:
    """Verify a token store with `data.verify.verify` on the cluster."""
    return verification.verify(settings, actor_map)
