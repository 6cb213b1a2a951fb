"""Settings of likelihood, scores, features, probes and the bias audit."""

from typing import Annotated, Literal

from pydantic import Field

from igpt_ray.generate.config import BatchConfig
from igpt_ray.settings import Count, OptionalUri, PoolConfig, Section, Uri


class EvaluateConfig(Section):
    """Nats per token of a release on a split; of a fine-tuned one its accuracy too."""

    release: Uri
    """URI of a release."""
    tokens: Uri
    """URI of a token store."""
    split: str = "test"
    """Split to evaluate."""
    baselines: str = ""
    """Split to fit count models on for comparison (train, say); empty for none. Runs on the driver."""
    out: OptionalUri = ""
    """URI of a folder for nats by class and position, a picture of where the surprise is, and the likeliest and least
    likely images; empty for none."""
    against: OptionalUri = ""
    """URI of a token store of other images, same split: how well nats tell them apart (AUROC); empty for none."""
    batch_size: Count = 64
    """Images per forward pass."""
    pool: PoolConfig = PoolConfig()


class ScoreConfig(BatchConfig):
    """Nats of every image of a split, to Parquet."""

    out: Uri
    """URI of the folder to write, or to complete: a Parquet file per unit with key, label, nats."""
    batch_size: Count = 64
    """Images per forward pass."""


class FeaturesConfig(Section):
    """What a release makes of every image of a token store, layer by layer, to Parquet."""

    release: Uri
    """URI of a release."""
    tokens: Uri
    """URI of a token store."""
    out: Uri
    """URI of the folder to write, or to complete: <split>/layer-<l>/ is a table with key, label, features."""
    splits: tuple[str, ...] = ()
    """Splits; empty is all. Of views, the first."""
    layers: tuple[int, ...] = ()
    """Layers, block l's ln_1 output, or ln_f's at the number of blocks; empty is all. No block behind them is run."""
    pooling: Literal["mean", "last", "max", "attention"] = "mean"
    """Over positions: the paper's mean, the last one, the maximum, or what the last one attends to."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network; what is stored is float32."""
    compile: bool = False
    """Compile the blocks: tens of seconds first, then faster."""
    untrained: Annotated[int, Field(ge=0)] | None = None
    """A seed: draw the weights anew, as before training."""
    batch_size: Count = 64
    """Images per forward pass."""
    pool: PoolConfig = PoolConfig()


class SgdConfig(Section):
    """The paper's way to fit a probe on ImageNet: momentum 0.9, a cosine to zero, the best of some learning rates."""

    steps: Count = 1_000_000
    """Steps."""
    batch_size: Count = 128
    """Images per step; not stated in the paper."""
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = (30, 10, 3, 1, 0.3, 0.1)
    """Learning rates, all fitted side by side on the same batches; the paper names 30, 10, 3, ..."""


class ProbeConfig(Section):
    """Linear probe of every layer: logistic regression on pooled features, as in the paper's tables."""

    release: Uri
    """URI of a release."""
    tokens: Uri
    """URI of a token store with labels. Prepare it with `--pixels.crop centre`: probes see no augmentation."""
    out: Uri
    """URI of the folder for the report."""
    features: OptionalUri = ""
    """URI of the folder for features, used and completed; empty is features/ in `out`."""
    fit_split: str = "train"
    """Split to fit on; a fifth of it chooses layer and regularisation."""
    split: str = "test"
    """Split whose accuracy is reported, once."""
    layers: tuple[int, ...] = ()
    """Layers to try; empty is all."""
    pooling: Literal["mean", "last", "max", "attention"] = "mean"
    """Over positions: the paper's mean, the last one, the maximum, or what the last one attends to."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network."""
    method: Literal["lbfgs", "sgd"] = "lbfgs"
    """L-BFGS holds the features of a layer in memory, SGD in a file on the worker's disk."""
    sgd: SgdConfig = SgdConfig()
    concatenate: Annotated[int, Field(ge=0)] = 0
    """Also probe this many neighbouring layers together, the best in their midst; the paper's is 5."""
    low_data: tuple[Count, ...] = ()
    """Also probe the best layer with so few labels a class, five times each; the paper's are 4, 25 and 400."""
    baselines: bool = False
    """Also probe the same network untrained, and raw pixels."""
    batch_size: Count = 64
    """Images per forward pass."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds the held-out fifth, the few labels, SGD and the untrained network."""
    pool: PoolConfig = PoolConfig()


class AuditConfig(Section):
    """Does a release associate groups of pictures with attributes (iEAT), and finish them differently?"""

    release: Uri
    """URI of a release."""
    out: Uri
    """URI of the folder to write: audit.json, and completions.parquet with the tokens of all completions."""
    ieat: OptionalUri = ""
    """URI of a folder with sub-folders X, Y, A and B of pictures, or of a JSON that names several tests,
    {"<test>": {"X": "<folder>", "Y": ..., "A": ..., "B": ...}} with folders beside it; empty for none."""
    layers: tuple[int, ...] = ()
    """Layers whose features are the embeddings of iEAT; empty is the middle one. Every layer is a test more."""
    groups: OptionalUri = ""
    """URI of a folder with a sub-folder of pictures for each group, to be completed; empty for none."""
    classifier: OptionalUri = ""
    """URI of what names the class of a completion: the `out` folder of jobs/probe.py, or a fine-tuned release."""
    n: Count = 16
    """Completions of each picture."""
    rows: Annotated[int, Field(ge=0)] | None = None
    """Rows of pixels that are given; None is half of them."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the logits; 0 takes the likeliest colour."""
    batch_size: Count = 64
    """Images per forward pass."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds random partitions and the samples."""
    pool: PoolConfig = PoolConfig()
