"""Settings of pretraining, fine-tuning and estimates."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from igpt_ray import storage
from igpt_ray.model.config import ModelConfig
from igpt_ray.settings import Count, OptionalUri, Section, Uri


class OptimConfig(Section):
    """Adam as in the paper, section 3.3: no weight decay, one epoch of warm-up, cosine to zero.

    Not stated there, chosen here: linear warm-up, Adam's epsilon 1e-8, no clipping.
    """

    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate."""
    muon_lr: Annotated[float, Field(gt=0)] | None = None
    """Modern: peak learning rate of Muon on the matrices inside the blocks; None trains them by Adam as the rest."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon."""
    batch_size: Count = 128
    """Images per step, over all workers."""
    steps: Count = 1_000_000
    """Optimiser steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10_009
    """Steps of linear warm-up; the default is one ImageNet epoch of 128."""
    cooldown: Annotated[float, Field(ge=0, le=1)] | None = None
    """Modern: stay at the peak, then fall in a straight line to zero over this share of the steps (0 stays for ever, as
    in fine-tuning); None: cosine."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest gradient norm; None does not clip."""


class DataConfig(Section):
    """What is trained on."""

    tokens: OptionalUri = ""
    """URI of a token store written by jobs/prepare.py (required)."""
    split: str = "train"
    """Split of the store; `train+holdout` folds the held-out part back."""
    val_split: str = ""
    """Split whose loss is measured on the way (`holdout`, `val`), and whose pictures are finished in the samples."""
    val_images: Count = 2048
    """Largest number of its images, spread evenly over it."""


class WorkersConfig(Section):
    """Who trains."""

    n: Count = 1
    """WorkersConfig, each on a part of the batch."""
    min_n: Annotated[int, Field(ge=0)] = 0
    """Fewest workers to train on while there is no room for n; 0 waits for n. Batches and their order stay the same."""
    grow_after: Annotated[float, Field(ge=0)] = 60
    """Seconds that fewer workers than n train before they save and make way for more, where there is room by then."""
    shard: Annotated[int, Field(ge=0)] = 0
    """Workers that share weights, gradients and moments (FSDP2); 0 is all. With fewer there are several copies, and
    only gradients travel between them (HSDP): as many as a node has GPUs keeps the weights' traffic inside nodes."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs per worker; also its threads."""
    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs per worker, 0 or 1."""
    micro_batch: Annotated[int, Field(ge=0)] = 32
    """Largest number of images per worker in one forward pass, the rest of its share is accumulated; 0 is what fits
    into memory by `estimate.py`."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters and activations inside the step; master weights, reductions and loss stay float32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What a block computes again on the way back instead of keeping it. selective: all but matrix products, for about
    half of the activations; full: everything, a third more work, for activations of one block instead of all."""
    compile: bool = False
    """Compile the blocks with torch.compile; needs a C++ compiler on every worker."""
    patience: Count = 1800
    """Seconds that a worker may keep the others waiting before it is taken for hung, and all are started again.
    Samples, and the download of a checkpoint, make them wait too."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a run may lose workers or their controller, without a new checkpoint in between, and go on."""

    @model_validator(mode="after")
    def _numbers_of_workers_agree(self) -> Self:
        if self.min_n > self.n:
            raise ValueError(f"min_n {self.min_n} is more than n {self.n}")
        if self.shard and self.n % self.shard:
            raise ValueError(f"n {self.n} is not a multiple of shard {self.shard}")
        return self

    @property
    def fewest(self) -> int:
        return self.min_n or self.n

    @property
    def fsdp_size(self) -> int:
        return self.shard or self.n


class RunConfig(Section):
    """Where the run lives and what it writes."""

    root: Uri = storage.absolute("runs")
    """URI of the folder of runs; must be reachable from every worker."""
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "run"
    """Name of the run. The same name and settings resume it."""
    resume: Literal["auto", "never"] | Annotated[int, Field(gt=0)] = "auto"
    """From the newest whole checkpoint (auto); not at all, and refuse a run that has one (never); or from the one of
    this step, setting later ones aside."""
    log_every: Count = 10
    """Steps between lines of metrics."""
    checkpoint_every: Count = 1000
    """Steps between checkpoints."""
    keep: Count = 2
    """Checkpoints kept; older ones are deleted once a newer one is committed."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints of every so many steps are kept for ever; 0 is of none. A multiple of checkpoint_every."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between measurements of the loss on data.val_split; 0 is never."""
    sample_every: Annotated[int, Field(ge=0)] = 0
    """Steps between sheets of finished pictures, `<run>/samples/`; 0 is never. Worker 0 then holds a whole network."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard's events, `<run>/tensorboard/`."""
    track: Literal["wandb", "mlflow"] | None = None
    """Also send the metrics to Weights & Biases or MLflow; needs the extra [track], and their variables on worker 0."""
    profile_at: Annotated[int, Field(ge=0)] = 0
    """Step before which torch's profiler begins to watch worker 0, for 3 steps: `<run>/profile/`; 0 is never."""

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> Self:
        every = self.checkpoint_every
        if self.keep_every % every:
            raise ValueError(f"keep_every {self.keep_every} is not a multiple of checkpoint_every {every}")
        return self

    @property
    def uri(self) -> str:
        return storage.join(self.root, self.name)

    @property
    def release(self) -> str:
        return storage.join(self.uri, "release")

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of `step` is kept for ever."""
        return self.keep_every > 0 and step % self.keep_every == 0


class PretrainConfig(Section):
    """Pretrain ImageGPT on a token store."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    workers: WorkersConfig = WorkersConfig()
    run: RunConfig = RunConfig()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the weights and the order of the images."""


class TuneConfig(Section):
    """What is changed of the images, and when it is enough."""

    pad: Annotated[int, Field(ge=0)] = 4
    """Pixels by which an image is reflected beyond its edges before a part of its own size is cut out at random. The
    paper's 4 is for CIFAR at 32x32; for ImageNet it is 0, with a store of several random views instead."""
    flip: bool = True
    """Mirror every other image, as the paper on CIFAR; not on ImageNet, and not what a mirror makes another thing."""
    patience: Count = 10
    """Looks at the held-out images without a new best after which to stop."""
    head: Literal["zeros", "probe"] = "zeros"
    """Where a head that the release lacks starts: at zero; or where a linear probe of the last features ends, on some
    of the images that are trained on (Kumar et al. 2022). It helps if the last layer tells classes apart."""
    scratch: bool = False
    """Draw the weights anew instead, and a head of zeros: what pretraining was worth."""


class FinetuningConfig(Section):
    """How a release is fine-tuned. The paper searches the rate for each network and does not state it: 3e-4, the
    warm-up and the patience are chosen here."""

    val_split: str = "holdout"
    """Split by whose accuracy to stop and choose; not the one to be reported on."""
    val_images: Count = 10_000
    """Largest number of its images, spread evenly over it."""
    tune: TuneConfig = TuneConfig()
    optim: OptimConfig = OptimConfig(lr=3e-4, steps=20_000, warmup_steps=500, cooldown=0)
    workers: WorkersConfig = WorkersConfig()
    run: RunConfig = RunConfig(name="finetuned", validate_every=400)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the order of the images and what is changed of them, masks, and weights that are drawn."""


class FinetuneConfig(FinetuningConfig):
    """Fine-tune all of a release, and a head that tells classes apart, on a labelled token store (paper, section 2.3).

    The loss is generative + classification, 1:1; the rate stays where it is, and the weights that are best on held-out
    images are kept. The defaults are for CIFAR; ImageNet's are `--tune.pad 0 --tune.no-flip`.
    """

    release: Uri
    """URI of the release to start from."""
    tokens: Uri
    """URI of a token store with labels."""
    split: str = "train"
    """Split to train on."""

    def training(self, model: ModelConfig) -> "FinetuneRunConfig":
        """The settings of the run, for the network of the release with its head."""
        data = DataConfig(tokens=self.tokens, split=self.split, val_split=self.val_split, val_images=self.val_images)
        same = {name: getattr(self, name) for name in ("release", "tune", "optim", "workers", "run", "seed")}
        return FinetuneRunConfig(model=model, data=data, **same)


class FinetuneRunConfig(PretrainConfig):
    """A run that fine-tunes: pretraining's settings, where it starts, and `Tune`."""

    release: Uri
    tune: TuneConfig


DeviceName = Literal["a100", "h100", "h200", "b200"]


class ClusterConfig(Section):
    """What an estimate is for: as many of these as `workers.n`."""

    device: DeviceName = "h200"
    """Accelerator of a worker, known by its data sheet."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the sheet's dense bf16 FLOPs that training reaches, causal attention counted; published: 0.3 to 0.45."""
    devices_per_node: Count = 8
    """Of which a worker has one."""
    node_gb_per_second: Annotated[float, Field(gt=0)] = 340
    """Bus bandwidth of collectives inside a node, as nccl-tests print it (all_gather on eight H100)."""
    bus_gb_per_second: Annotated[float, Field(gt=0)] = 360
    """The same over all workers of several nodes. The default is nine tenths of eight 400 Gbit/s ports of a node."""
    store_gb_per_second: Annotated[float, Field(gt=0)] = 3
    """What a node reads from, or writes to, the object store."""
    images: Count = 1_281_167
    """Of the training split; the default is ImageNet's."""
    failure_hours: Annotated[float, Field(gt=0)] = 50_000
    """Hours of a device between failures that end a step: 419 in 54 days of 16,384 (Llama 3, arXiv 2407.21783)."""
    price: Annotated[float, Field(gt=0)] | None = None
    """Dollars for an hour of one device."""


class EstimateConfig(PretrainConfig):
    """What a run will take, before it starts: memory, traffic, hours, money."""

    cluster: ClusterConfig = ClusterConfig()
