"""Every test of this folder that is marked `ray` runs on the cluster of the session."""

import pytest


@pytest.fixture(autouse=True)
def _on_the_cluster(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("ray"):
        request.getfixturevalue("cluster")
