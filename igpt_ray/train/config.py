"""Settings of pretraining, fine-tuning and estimates."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from igpt_ray import storage
from igpt_ray.model.config import ModelConfig
from igpt_ray.settings import Count, OptionalUri, Section, Uri

CPU_MICRO_BATCH = 32
"""Images per forward pass on a CPU, whose workers share memory, so that the number that fits is not known."""


class OptimConfig(Section):
    """Adam as in the paper (section 3.3): no weight decay, one epoch of warm-up, cosine decay to zero.

    The paper does not state: linear warm-up, Adam's epsilon 1e-8, no gradient clipping.
    """

    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate."""
    muon_lr: Annotated[float, Field(gt=0)] | None = None
    """Not in the paper: peak learning rate of Muon for the matrices inside the blocks; None uses Adam for all."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon."""
    batch_size: Count = 128
    """Images per step, over all workers."""
    steps: Count = 1_000_000
    """Optimiser steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10_009
    """Steps of linear warm-up; the default is one epoch of ImageNet at batch size 128."""
    schedule: Literal["cosine", "constant", "warmup_stable_decay"] = "cosine"
    """Learning rate after the warm-up: cosine decay to zero; constant; or constant, then linear decay to zero."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the steps in which warmup_stable_decay decays."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest gradient norm; None for no clipping."""


class DataConfig(Section):
    """The training data."""

    tokens: OptionalUri = ""
    """URI of a token store, as `igpt prepare` writes it (required)."""
    split: str = "train"
    """Split to train on; `train+holdout` includes the held-out images."""
    val_split: str = ""
    """Split for the held-out loss (`holdout`, `val`) and for the images of the samples."""
    val_images: Count = 2048
    """Largest number of images of val_split to evaluate, evenly spaced."""


class WorkersConfig(Section):
    """The workers of a run."""

    n: Count = 1
    """Number of workers. Each trains on its part of the batch."""
    min_n: Count | None = None
    """Least number of workers to train with while the cluster lacks resources for n; None waits for n. Batches and
    their order do not change."""
    grow_after: Annotated[float, Field(ge=0)] = 60
    """Seconds after which a run with fewer than n workers saves and restarts with more, if resources allow."""
    shard: Count | None = None
    """Workers that weights, gradients and moments are sharded over (FSDP2); None for all. A smaller number makes
    replicas that exchange only gradients (HSDP); with the number of GPUs of a node, weights stay inside nodes."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs, and threads, per worker."""
    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs per worker, 0 or 1."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Largest number of images per worker in one forward pass; gradients of several passes are accumulated. auto: 32 on
    a CPU; on a GPU, the largest number that fits into its memory by the arithmetic of `igpt estimate`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of parameters and activations in a step. Master weights, reductions and losses are float32. auto: float32 on
    a CPU, bfloat16 on a GPU."""
    float32_matmul: Literal["highest", "high"] = "highest"
    """Matrix products of float32 on GPUs: highest is float32; high is TF32 (10 bits of mantissa, tensor cores)."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations that a block recomputes in the backward pass. selective: all but matrix products, for a third less
    memory. full: all; computes a third more, and stores the activations of one block only."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the blocks with torch.compile, which needs a C++ compiler on a CPU, and Triton and a C compiler on a GPU.
    auto: False on a CPU, True on a GPU. If it fails on a worker, a warning says so and the blocks are not compiled."""
    collective_timeout_s: Count = 1800
    """Seconds after which a collective operation fails and all workers are restarted. Must be longer than sampling and
    the download of a checkpoint."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Failures of workers or their controller that a run survives; a new checkpoint starts the count again."""

    @model_validator(mode="after")
    def _numbers_of_workers_agree(self) -> Self:
        if (self.min_n or 0) > self.n:
            raise ValueError(f"min_n {self.min_n} is more than n {self.n}")
        if self.shard and self.n % self.shard:
            raise ValueError(f"n {self.n} is not a multiple of shard {self.shard}")
        return self

    def resolved(self, on_gpu: bool, started: dict[str, Any] | None = None) -> Self:
        """These settings with values in place of `auto`: those of the device, or of the run that is resumed.

        `started` has the settings of the workers with which the run was started. Its precision is kept on any device,
        because it changes losses; the others only if the run does not move between CPU and GPU. A number of images that
        depends on the memory of a GPU remains `auto` until the workers know it.
        """
        values: dict[str, Any] = {"precision": "bfloat16", "compile": True, "micro_batch": "auto"}
        if not on_gpu:
            values = {"precision": "float32", "compile": False, "micro_batch": CPU_MICRO_BATCH}
        if started is not None:
            same_device = (started.get("gpus", 0) > 0) == on_gpu
            names = values.keys() if same_device else {"precision"}
            values |= {name: started[name] for name in names if started.get(name, "auto") != "auto"}
        return self.model_copy(update={name: value for name, value in values.items() if getattr(self, name) == "auto"})

    @property
    def min_workers(self) -> int:
        return self.min_n or self.n

    @property
    def fsdp_size(self) -> int:
        return self.shard or self.n


class RunConfig(Section):
    """The folder of a run and what is written to it."""

    root: Uri = storage.absolute("runs")
    """URI of the folder of runs; every worker must have access to it."""
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "run"
    """Name of the run. A command with the same name and settings resumes it."""
    resume: Literal["auto", "never"] | Annotated[int, Field(gt=0)] = "auto"
    """auto resumes from the newest valid checkpoint; never refuses a run that has one; a number resumes from the
    checkpoint of that step and sets later ones aside: leave it out when the command is repeated."""
    log_every: Count = 10
    """Steps between lines of metrics."""
    checkpoint_every: Count = 1000
    """Steps between checkpoints."""
    keep: Count = 2
    """Number of checkpoints to keep; older ones are deleted when a newer one is committed."""
    keep_every: Count | None = None
    """Steps between checkpoints that are never deleted, a multiple of checkpoint_every; None for none."""
    validate_every: Count | None = None
    """Steps between evaluations on data.val_split; None for never."""
    sample_every: Count | None = None
    """Steps between figures of sample completions, `<run>/samples/`; None for never. Worker 0 then needs memory for
    the unsharded network."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events, `<run>/tensorboard/`. Needs the extra [track]."""
    track: Literal["wandb", "mlflow"] | None = None
    """Also send the metrics to Weights & Biases or MLflow. Needs the extra [track], and their variables on worker 0."""
    profile_at: Count | None = None
    """First of 3 steps in which torch's profiler records worker 0, `<run>/profile/`; None for never."""

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> Self:
        every = self.checkpoint_every
        if self.keep_every is not None and self.keep_every % every:
            raise ValueError(f"keep_every {self.keep_every} is not a multiple of checkpoint_every {every}")
        return self

    @property
    def uri(self) -> str:
        return storage.join(self.root, self.name)

    @property
    def release(self) -> str:
        return storage.join(self.uri, "release")

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of `step` is never deleted."""
        return self.keep_every is not None and step % self.keep_every == 0


class PretrainConfig(Section):
    """Pretrain ImageGPT on a token store."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    workers: WorkersConfig = WorkersConfig()
    run: RunConfig = RunConfig()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights and of the order of the images."""

    def resolved(self, on_gpu: bool, started: dict[str, Any] | None = None) -> Self:
        """See `WorkersConfig.resolved`."""
        return self.model_copy(update={"workers": self.workers.resolved(on_gpu, started)})


class TuneConfig(Section):
    """Augmentation, initial weights and early stopping of fine-tuning."""

    pad: Annotated[int, Field(ge=0)] = 4
    """Pixels of reflection padding before a random crop of the original size. The paper's 4 is for CIFAR at 32x32; for
    ImageNet use 0 and a token store with several random views."""
    flip: bool = True
    """Mirror an image with probability 1/2, as the paper does on CIFAR but not on ImageNet. Not for digits or text."""
    patience: Count = 10
    """Evaluations without a new best held-out accuracy after which training stops."""
    head: Literal["zeros", "probe"] = "zeros"
    """Initial weights of a new classification head: zeros; or a linear probe of the last layer's features, fitted on
    training images (Kumar et al. 2022), which helps if those features separate the classes."""
    scratch: bool = False
    """Start from random weights instead of the release, to measure the benefit of pretraining."""


class FinetuningConfig(Section):
    """Fine-tuning. The paper searches the learning rate per model and does not state it: 3e-4, the warm-up and the
    patience are our choice."""

    val_split: str = "holdout"
    """Split for early stopping. Report the accuracy on another split."""
    val_images: Count = 10_000
    """Largest number of images of val_split to evaluate, evenly spaced."""
    tune: TuneConfig = TuneConfig()
    optim: OptimConfig = OptimConfig(lr=3e-4, steps=20_000, warmup_steps=500, schedule="constant")
    workers: WorkersConfig = WorkersConfig()
    run: RunConfig = RunConfig(name="finetuned", validate_every=400)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of the images, augmentation, masks and random weights."""


class FinetuneConfig(FinetuningConfig):
    """Fine-tune a release with a classification head on a labelled token store (paper, section 2.3).

    The loss is generative + classification, 1:1. The learning rate is constant, and the weights with the best held-out
    accuracy become the release. The defaults are for CIFAR; for ImageNet use `--tune.pad 0 --tune.no-flip`.
    """

    release: Uri
    """URI of the release to start from."""
    tokens: Uri
    """URI of a token store with labels."""
    split: str = "train"
    """Split to train on."""

    def training(self, model: ModelConfig) -> "FinetuneRunConfig":
        """The settings of the run, for the network of the release with a head."""
        data = DataConfig(tokens=self.tokens, split=self.split, val_split=self.val_split, val_images=self.val_images)
        same = {name: getattr(self, name) for name in ("release", "tune", "optim", "workers", "run", "seed")}
        return FinetuneRunConfig(model=model, data=data, **same)


class FinetuneRunConfig(PretrainConfig):
    """A fine-tuning run: the settings of pretraining, the release, and `TuneConfig`."""

    release: Uri
    tune: TuneConfig


DeviceName = Literal["a100", "h100", "h200", "b200"]


class ClusterConfig(Section):
    """The hardware of an estimate, with `workers.n` devices."""

    device: DeviceName = "h200"
    """Accelerator of a worker; its figures are from its data sheet."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the data sheet's dense bf16 FLOPs that training reaches; published values are 0.3 to 0.45."""
    devices_per_node: Count = 8
    """Devices per node; a worker has one."""
    node_gb_per_second: Annotated[float, Field(gt=0)] = 340
    """Bus bandwidth of collectives inside a node, as nccl-tests report it (all_gather on eight H100)."""
    bus_gb_per_second: Annotated[float, Field(gt=0)] = 360
    """Bus bandwidth over several nodes. The default is 90 % of eight 400 Gbit/s ports per node."""
    store_gb_per_second: Annotated[float, Field(gt=0)] = 3
    """Throughput of a node to and from the object store."""
    images: Count = 1_281_167
    """Images in the training split; the default is ImageNet."""
    failure_hours: Annotated[float, Field(gt=0)] = 50_000
    """Mean hours between failures of a device: Llama 3 had 419 in 54 days of 16,384 devices (arXiv 2407.21783)."""
    price: Annotated[float, Field(gt=0)] | None = None
    """Dollars per hour of one device."""


class EstimateConfig(PretrainConfig):
    """Estimate memory, traffic, hours and cost of a run before it starts. Every worker has a GPU."""

    workers: Annotated[
        WorkersConfig, Field(validate_default=True), AfterValidator(lambda workers: workers.resolved(on_gpu=True))
    ] = WorkersConfig()
    cluster: ClusterConfig = ClusterConfig()
