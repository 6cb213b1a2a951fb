"""Settings of flows that join several wings: report, node watcher, demo."""

from typing import Annotated, Literal

from pydantic import Field

from igpt_ray import storage
from igpt_ray.settings import Count, OptionalUri, PoolConfig, Section, Uri
from igpt_ray.train.config import FinetuningConfig


class ReportConfig(Section):
    """All that can be said of a release on one page: likelihood, probes, fine-tuning, completions, palette."""

    release: Uri
    """URI of a release."""
    tokens: Uri
    """URI of a token store."""
    out: Uri
    """URI of the folder to write: report.html, report.json, row.md, and a folder for each part. A part that is there
    is not made again."""
    split: str = "test"
    """Split that is reported on."""
    fit_split: str = "train"
    """Split to fit probes and count models on; empty leaves both out (images without labels)."""
    features: OptionalUri = ""
    """URI of the folder for features, used and completed; empty is features/ of the probe's part."""
    low_data: tuple[Count, ...] = (4, 25, 400)
    """Labels a class for probes with few of them; more than the smallest class has are left out, and named."""
    finetune: bool = False
    """Also fine-tune the network and, in the same way, one from scratch, on `fit_split`."""
    finetuning: FinetuningConfig = FinetuningConfig()
    """How. The folder of these runs is finetuning/ in `out`, and one of them is from scratch, whatever is said here."""
    images: Count = 8
    """Pictures that are completed, spread evenly over the split."""
    n: Count = 4
    """Completions of each."""
    batch_size: Count = 64
    """Images per forward pass."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds the probe's held-out fifth, the few labels, the untrained network, and the completions."""
    pool: PoolConfig = PoolConfig()


class WatchConfig(Section):
    """Watch for the cloud calling this node back, and drain it."""

    cloud: Literal["aws", "gcp"]
    """Whose machine this is."""
    address: str = ""
    """The head's, host:port; empty is RAY_ADDRESS."""
    node: str = ""
    """Id of the node; empty is the one at this machine's address."""
    rebalance: bool = False
    """Also leave when AWS only recommends it, often long before a notice and often without one to follow."""
    every: Annotated[float, Field(gt=0)] = 2
    """Seconds between looks."""
    metadata: str = ""
    """URL of the metadata server; empty is the cloud's own."""


class DemoConfig(Section):
    """The whole path on handwritten digits, on this machine."""

    out: Uri = storage.absolute("demo-out")
    """Folder for the report, the figure and (with the local store) all data. Its earlier content is replaced."""
    store: Literal["local", "s3"] = "local"
    """Keep the data in files below `out`, or in an S3 server on loopback under a random key."""
    steps: Count = 330
    """Training steps."""
    workers: Count = 2
    """Training workers."""
