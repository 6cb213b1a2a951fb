"""Settings of the report, the node watcher and the demo."""

from typing import Annotated, Literal

from pydantic import Field

from igpt_ray.evaluate.config import StoreSection
from igpt_ray.settings import Count, OptionalUri, Section, Uri
from igpt_ray.train.config import FinetuningConfig


class ReportConfig(StoreSection):
    """Report of a release on one page: likelihood, probes, fine-tuning, completions, palette."""

    out: Uri
    """URI of the folder to write: report.html, report.json, row.md, and a folder for each part. Existing parts are
    reused."""
    split: str = "test"
    """Split to evaluate on."""
    fit_split: str = "train"
    """Split to fit probes and count-based baselines on; empty omits both (images without labels)."""
    features: OptionalUri = ""
    """URI of the folder for features, which are reused; empty is features/ in the folder of the probe."""
    low_data: tuple[Count, ...] = (4, 25, 400)
    """Labels per class of the few-shot probes. Numbers above the size of the smallest class are skipped and listed."""
    finetune: bool = False
    """Also fine-tune the release on `fit_split`, and train a network from scratch in the same way."""
    finetuning: FinetuningConfig = FinetuningConfig()
    """Settings of both runs. Their folder is finetuning/ in `out`; the initial weights are set by the report."""
    images: Count = 8
    """Images to complete, evenly spaced over the split."""
    n: Count = 4
    """Completions per image."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the probe's held-out fifth, the few-shot labels, the untrained network and the completions."""


class WatchConfig(Section):
    """Poll for preemption notices of the cloud, and drain this node on a notice."""

    cloud: Literal["aws", "gcp"]
    """Cloud of this machine."""
    address: str = ""
    """Address of the head, host:port; empty is RAY_ADDRESS."""
    node: str = ""
    """Id of the Ray node; empty is the node with this machine's IP address."""
    rebalance: bool = False
    """Also drain on AWS's rebalance recommendation, which often comes long before a notice, or without one."""
    every: Annotated[float, Field(gt=0)] = 2
    """Seconds between polls."""
    metadata: str = ""
    """URL of the metadata server; empty is the cloud's default."""


class DemoConfig(Section):
    """Every stage on handwritten digits, on this machine."""

    out: Annotated[Uri, Field(validate_default=True)] = "demo-out"
    """Folder for the report, the figure and (with the local store) all data. Existing content is replaced."""
    store: Literal["local", "s3"] = "local"
    """Store the data in files in `out`, or in an S3 server on loopback with a random key."""
    steps: Count = 330
    """Training steps."""
    workers: Count = 2
    """Training workers."""
