"""What a cloud tells a machine that it takes back, and what a machine elsewhere is told."""

import time
from datetime import UTC, datetime

import pytest
from metadata import Metadata

from igpt_ray.errors import StorageError
from igpt_ray.flows import preemption
from igpt_ray.flows.preemption import Notice


def test_preemption_notices_of_each_cloud_are_parsed(metadata: Metadata) -> None:
    metadata.said["/computeMetadata/v1/instance/preempted"] = "FALSE"
    assert preemption.poll("aws", metadata.url) is None
    assert preemption.poll("aws", metadata.url, rebalance=True) is None
    assert preemption.poll("gcp", metadata.url) is None

    metadata.said["/latest/meta-data/events/recommendations/rebalance"] = '{"noticeTime": "2026-11-22T08:00:00Z"}'
    assert preemption.poll("aws", metadata.url) is None
    assert preemption.poll("aws", metadata.url, rebalance=True) == Notice("rebalance recommendation", None)

    action = '{"action": "terminate", "time": "2026-11-22T08:22:00Z"}'
    metadata.said["/latest/meta-data/spot/instance-action"] = action
    deadline = datetime(2026, 11, 22, 8, 22, tzinfo=UTC).timestamp()
    assert preemption.poll("aws", metadata.url, rebalance=True) == Notice("spot terminate", deadline)

    metadata.said["/computeMetadata/v1/instance/preempted"] = "TRUE"
    found = preemption.poll("gcp", metadata.url)
    assert found is not None
    assert found.why == "preempted"
    assert found.deadline == pytest.approx(time.time() + 30, abs=5)


def test_another_cloud_is_reported(metadata: Metadata) -> None:
    with pytest.raises(StorageError, match="is this a machine of the cloud"):
        preemption.poll("aws", metadata.url + "/nowhere")
    metadata.shutdown()
    metadata.server_close()
    with pytest.raises(StorageError, match="does not answer: is this a machine of the cloud"):
        preemption.poll("aws", metadata.url)
