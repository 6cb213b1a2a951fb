"""Settings of likelihood, scores, features, probes and the bias audit."""

from typing import Annotated, Literal

from pydantic import Field

from igpt_ray.generate.config import BatchConfig
from igpt_ray.settings import Count, OptionalUri, PoolConfig, Section, Uri


class ReleaseSection(Section):
    """Settings of every command that runs a release."""

    release: Uri
    """URI of a release."""
    batch_size: Count = 64
    """Images per forward pass."""
    pool: PoolConfig = PoolConfig()


class StoreSection(ReleaseSection):
    """Settings of every command that runs a release on a token store."""

    tokens: Uri
    """URI of a token store."""


class FeatureSection(StoreSection):
    """Settings of features."""

    layers: tuple[int, ...] = ()
    """Layers; empty for all. Layer l is the ln_1 output of block l; the last is the ln_f output."""
    pooling: Literal["mean", "last", "max", "attention"] = "mean"
    """Pooling over positions: mean (the paper), last position, maximum, or attention of the last position."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network; features are stored as float32."""


class EvaluateConfig(StoreSection):
    """Nats per token of a release on a split, and the accuracy of a fine-tuned release."""

    split: str = "test"
    """Split to evaluate."""
    baselines: str = ""
    """Split to fit count models on as baselines (train, for example); empty for none. Runs on the driver."""
    out: OptionalUri = ""
    """URI of a folder for nats by class and position, a heat map of positions, and the most and least likely images;
    empty for none."""
    against: OptionalUri = ""
    """URI of a token store of other images: AUROC with which nats separate this split of both; empty for none."""


class ScoreConfig(BatchConfig):
    """Nats of every image of a split, as Parquet."""

    out: Uri
    """URI of the output folder: a Parquet file per unit with key, label, nats. A repeat adds only missing units."""
    batch_size: Count = 64
    """Images per forward pass."""


class FeaturesConfig(FeatureSection):
    """Features of every image of a token store at every layer of a release, as Parquet."""

    out: Uri
    """URI of the output folder: <split>/layer-<l>/ is a table with key, label, features. A repeat adds missing ones."""
    splits: tuple[str, ...] = ()
    """Splits; empty for all. Of several views the first is used."""
    compile: bool = False
    """Compile the blocks: takes tens of seconds at the start, then each batch is faster."""
    untrained: Annotated[int, Field(ge=0)] | None = None
    """Seed of random initial weights to use instead of the release's; None for the release's."""


class SgdConfig(Section):
    """SGD as in the paper's ImageNet probes: momentum 0.9, cosine decay to zero, the best of several learning rates."""

    steps: Count = 1_000_000
    """Number of steps."""
    batch_size: Count = 128
    """Images per step; not stated in the paper."""
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = (30, 10, 3, 1, 0.3, 0.1)
    """Learning rates, all fitted at once on the same batches; the paper lists 30, 10, 3, ..."""


class ProbeConfig(FeatureSection):
    """Linear probe of every layer: logistic regression on pooled features, as in the paper's tables."""

    tokens: Uri
    """URI of a token store with labels. Prepare it with `--pixels.crop centre`: probes see no augmentation."""
    out: Uri
    """URI of the folder for the report."""
    features: OptionalUri = ""
    """URI of the folder for features; a repeat adds missing ones. Empty for features/ in `out`."""
    fit_split: str = "train"
    """Split to fit on; a fifth of it is held out to select layer and regularisation."""
    split: str = "test"
    """Split to report accuracy on; evaluated once."""
    method: Literal["lbfgs", "sgd"] = "lbfgs"
    """L-BFGS needs the features of a layer in memory; SGD reads them from a file on the worker's disk."""
    sgd: SgdConfig = SgdConfig()
    concatenate: Annotated[int, Field(ge=0)] = 0
    """Also probe the concatenation of this many layers around the best (the paper uses 5); 0 for none."""
    low_data: tuple[Count, ...] = ()
    """Also probe the best layer with so many labels per class, five runs each; the paper uses 4, 25 and 400."""
    baselines: bool = False
    """Also probe the untrained network and raw pixels."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the held-out fifth, the few labels, SGD and the untrained network."""


class AuditConfig(ReleaseSection):
    """Bias audit: associations of groups of images with attributes (iEAT), and completions by group."""

    out: Uri
    """URI of the output folder: audit.json, and completions.parquet with the tokens of all completions."""
    ieat: OptionalUri = ""
    """URI of a folder with sub-folders X, Y, A and B of images, or of a JSON file of several tests,
    {"<test>": {"X": "<folder>", "Y": ..., "A": ..., "B": ...}}, next to these folders; empty for none."""
    layers: tuple[int, ...] = ()
    """Layers whose features are the embeddings of iEAT; empty for the middle layer. Each layer adds a test."""
    groups: OptionalUri = ""
    """URI of a folder with a sub-folder of images to complete for each group; empty for none."""
    classifier: OptionalUri = ""
    """URI of the classifier of completions: the `out` folder of jobs/probe.py, or a fine-tuned release."""
    n: Count = 16
    """Completions per image."""
    rows: Annotated[int, Field(ge=0)] | None = None
    """Rows of pixels in the prompt; None for half of the image."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divisor of the logits; 0 takes the most likely colour."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of random partitions and of samples."""
