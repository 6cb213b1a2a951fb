"""Settings: what each job takes, with units; and PRESETS, the published sizes.

All are frozen and strict: an unknown name or an impossible value is refused where it is read. A function takes the
section it needs (`Optim`, not `Pretrain`). Derived values are properties.
"""

import difflib
import ipaddress
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from igpt_ray import storage

Uri = Annotated[str, AfterValidator(storage.absolute)]
OptionalUri = Annotated[str, AfterValidator(lambda uri: storage.absolute(uri) if uri else uri)]
Count = Annotated[int, Field(gt=0)]
Layout = Literal["folders", "kaggle", "tars", "webdataset", "parquet"]

OPENAI_PALETTE = "openai"
"""The word that names OpenAI's own palette where a URI is expected; a file of that name is `./openai`."""


def _palette(uri: str) -> str:
    return uri if uri == OPENAI_PALETTE else storage.absolute(uri)


PaletteUri = Annotated[str, AfterValidator(_palette)]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _named(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Each `name=URI`. A bare URI is called after its last folder that tells something: release/ of a run does not."""
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, uri = entry.partition("=")
        if not equals or "/" in name:
            name, uri = "", entry
            parts = [part for part in storage.absolute(uri).split("/") if part and part != "release"]
            name = parts[-1] if parts else ""
        if not NAME.fullmatch(name):
            raise ValueError(f"{entry!r} has no name for requests to use: write name={uri}, of letters, digits, . _ -")
        if name in found:
            raise ValueError(f"two are called {name!r}: write name=URI with different names")
        found[name] = storage.absolute(uri)
    return tuple(f"{name}={uri}" for name, uri in found.items())


Named = Annotated[
    tuple[str, ...], AfterValidator(_named), BeforeValidator(lambda one: (one,) if isinstance(one, str) else one)
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


# ------------------------------------------------------------------------------------------------ pretraining


class Model(Section):
    """The network [facts of the paper, section 2, and OpenAI's `src/model.py`]."""

    n_layer: Count = 24
    """Blocks."""
    n_embd: Count = 512
    """Width."""
    n_head: Count = 8
    """Attention heads; must divide the width."""
    n_px: Count = 32
    """Pixels a side; the sequence has n_px * n_px positions."""
    n_vocab: Annotated[int, Field(ge=2, le=65536)] = 512
    """Colours of the palette."""
    objective: Literal["next", "masked"] = "next"
    """Predict the next pixel, or the masked ones as in BERT: then no start vector and no causal mask."""
    n_class: Annotated[int, Field(ge=0)] = 0
    """Classes that a head for fine-tuning tells apart; 0 has no head."""
    qk_norm: bool = False
    """Modern: RMS norms, with gains, on the queries and keys of each head."""
    rotary: bool = False
    """Modern: queries and keys are turned by their row and column; the learned positions stay."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.rotary and self.head_width % 4:
            raise ValueError(f"rotary wants heads of a multiple of 4 wide; n_embd / n_head is {self.head_width}")
        return self

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def modern(self) -> list[str]:
        """The switches that are on: neither the paper nor transformers has them."""
        return [name for name in ("qk_norm", "rotary") if getattr(self, name)]

    @property
    def n_positions(self) -> int:
        return self.n_px * self.n_px

    @property
    def n_params(self) -> int:
        d, n = self.n_embd, self.n_positions
        sos = d if self.objective == "next" else 0
        gains = 2 * d + (2 * self.head_width if self.qk_norm else 0)
        return self.n_layer * (12 * d * d + gains) + n * d + 2 * self.n_vocab * d + d + sos + self.n_class * d


class Optim(Section):
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


class Data(Section):
    """What is trained on."""

    tokens: OptionalUri = ""
    """URI of a token store written by jobs/prepare.py (required)."""
    split: str = "train"
    """Split of the store; `train+holdout` folds the held-out part back."""
    val_split: str = ""
    """Split whose loss is measured on the way (`holdout`, `val`), and whose pictures are finished in the samples."""
    val_images: Count = 2048
    """Largest number of its images, spread evenly over it."""


class Workers(Section):
    """Who trains."""

    n: Count = 1
    """Workers, each on a part of the batch."""
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
    def sharing(self) -> int:
        return self.shard or self.n


class Run(Section):
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


class Pretrain(Section):
    """Pretrain ImageGPT on a token store."""

    model: Model = Model()
    optim: Optim = Optim()
    data: Data = Data()
    workers: Workers = Workers()
    run: Run = Run()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the weights and the order of the images."""


# ------------------------------------------------------------------------------------------------ fine-tuning


class Tune(Section):
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


class Finetuning(Section):
    """How a release is fine-tuned. The paper searches the rate for each network and does not state it: 3e-4, the
    warm-up and the patience are chosen here."""

    val_split: str = "holdout"
    """Split by whose accuracy to stop and choose; not the one to be reported on."""
    val_images: Count = 10_000
    """Largest number of its images, spread evenly over it."""
    tune: Tune = Tune()
    optim: Optim = Optim(lr=3e-4, steps=20_000, warmup_steps=500, cooldown=0)
    workers: Workers = Workers()
    run: Run = Run(name="finetuned", validate_every=400)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the order of the images and what is changed of them, masks, and weights that are drawn."""


class Finetune(Finetuning):
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

    def training(self, model: Model) -> "Tuning":
        """The settings of the run, for the network of the release with its head."""
        data = Data(tokens=self.tokens, split=self.split, val_split=self.val_split, val_images=self.val_images)
        same = {name: getattr(self, name) for name in ("release", "tune", "optim", "workers", "run", "seed")}
        return Tuning(model=model, data=data, **same)


class Tuning(Pretrain):
    """A run that fine-tunes: pretraining's settings, where it starts, and `Tune`."""

    release: Uri
    tune: Tune


# ------------------------------------------------------------------------------------------------ estimates


DeviceName = Literal["a100", "h100", "h200", "b200"]


class Cluster(Section):
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


class Estimate(Pretrain):
    """What a run will take, before it starts: memory, traffic, hours, money."""

    cluster: Cluster = Cluster()


def _paper(n_layer: int, n_embd: int, n_head: int, n_px: int, optim: Optim) -> Pretrain:
    """A recipe of the paper. What it does not state is chosen in `Optim`; the pixels in `images.py`."""
    return Pretrain(model=Model(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_px=n_px), optim=optim)


def _bert(recipe: Pretrain, lr: float) -> Pretrain:
    """The masked twin of a recipe: the paper changes the objective and the learning rate, and states nothing else."""
    model = recipe.model.model_copy(update={"objective": "masked"})
    return recipe.model_copy(update={"model": model, "optim": recipe.optim.model_copy(update={"lr": lr})})


def _modern(recipe: Pretrain, lr: float, muon_lr: float) -> Pretrain:
    """The modern twin: the same size, images, batch and steps. What it changes was chosen by `jobs/bench.py modern` on
    tiny networks (README, Results); the rates of larger ones were tuned by nobody: those of the paper for Adam, for
    Muon what its authors use."""
    model = recipe.model.model_copy(update={"qk_norm": True, "rotary": True})
    optim = recipe.optim.model_copy(update={"lr": lr, "muon_lr": muon_lr, "cooldown": 0.6})
    return recipe.model_copy(update={"model": model, "optim": optim})


TINY = Pretrain(
    model=Model(n_layer=4, n_embd=128, n_head=4, n_px=8, n_vocab=64),
    optim=Optim(lr=3e-3, batch_size=64, steps=330, warmup_steps=30),
    workers=Workers(micro_batch=64),
    run=Run(checkpoint_every=110),
)
IGPT_S = _paper(24, 512, 8, 32, Optim(lr=3e-3))
IGPT_M = _paper(36, 1024, 8, 32, Optim(lr=3e-3))
IGPT_L = _paper(48, 1536, 16, 32, Optim(lr=1e-3))
IGPT_L_48 = _paper(48, 1536, 16, 48, Optim(lr=1e-2))
IGPT_XL = _paper(60, 3072, 32, 64, Optim(lr=3e-4, batch_size=64, steps=2_000_000, warmup_steps=20_018))

PRESETS: dict[str, tuple[str, Pretrain]] = {
    "tiny": (
        "4 layers x 128 at 8x8, 64 colours: learns something on a laptop in a minute",
        TINY,
    ),
    "igpt-s": ("iGPT-S of the paper, 76.6M parameters", IGPT_S),
    "igpt-m": ("iGPT-M of the paper, 455M parameters", IGPT_M),
    "igpt-l": ("iGPT-L of the paper at 32x32, 1.36B parameters", IGPT_L),
    "igpt-l-48": ("iGPT-L of the paper at 48x48, 1.36B parameters; a learning rate of 0.01 as printed", IGPT_L_48),
    "igpt-xl": (
        "iGPT-XL of the paper, 6.8B parameters; its heads are not stated: 32 keep the head width of L",
        IGPT_XL,
    ),
    "igpt-s-bert": ("iGPT-S of the paper with masked pixels", _bert(IGPT_S, 1e-2)),
    "igpt-m-bert": ("iGPT-M of the paper with masked pixels", _bert(IGPT_M, 3e-3)),
    "igpt-l-bert": ("iGPT-L of the paper at 32x32 with masked pixels", _bert(IGPT_L, 1e-3)),
    "igpt-l-48-bert": (
        "iGPT-L at 48x48 with masked pixels; not in the paper: the rate of igpt-l-bert",
        _bert(IGPT_L_48, 1e-3),
    ),
    "igpt-xl-bert": ("iGPT-XL with masked pixels; not in the paper: the rate of igpt-xl", _bert(IGPT_XL, 3e-4)),
    "tiny-modern": ("tiny with Muon and a modern network", _modern(TINY, 6e-3, 0.04)),
    "igpt-s-modern": ("iGPT-S with Muon and a modern network; not in the paper", _modern(IGPT_S, 3e-3, 0.02)),
    "igpt-m-modern": ("iGPT-M with Muon and a modern network; not in the paper", _modern(IGPT_M, 3e-3, 0.02)),
    "igpt-l-modern": ("iGPT-L at 32x32 with Muon and a modern network; not in the paper", _modern(IGPT_L, 1e-3, 0.02)),
    "igpt-xl-modern": ("iGPT-XL with Muon and a modern network; not in the paper", _modern(IGPT_XL, 3e-4, 0.02)),
}


P = TypeVar("P", bound=Pretrain)


def preset_from_words(words: list[str], settings: type[P]) -> P:
    """`["igpt-s", "--optim.lr", "1e-3"]` -> settings; a mistyped word ends the program with the nearest name.

    Once the preset is known tyro sees only that one, or its advice would repeat itself for each of them.
    """
    import tyro

    first = words[0] if words else "--help"
    job = f"jobs/{settings.__name__.lower()}.py"
    if first in PRESETS:
        chosen = PRESETS[first][1]
        default = settings(**{name: getattr(chosen, name) for name in Pretrain.model_fields})
        return tyro.cli(settings, default=default, args=words[1:], prog=f"{job} {first}")
    if first in ("-h", "--help"):
        print(f"usage: {job} PRESET [--setting VALUE ...]\n\n{settings.__doc__}\n\npresets:")
        for name, (clause, _) in PRESETS.items():
            print(f"  {name:20} {clause}")
        print(f"\ntheir settings: {job} tiny --help")
        sys.exit(0)
    if first.startswith("-"):
        said = "the first word must be a preset."
    else:
        said = f"no preset {first!r}, did you mean {difflib.get_close_matches(first, PRESETS, 1, cutoff=0)[0]}?"
    print(f"error: {said} There are {', '.join(PRESETS)}; their settings: {job} tiny --help", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------ the other jobs


class Pool(Section):
    """Ray Data actors that share the work."""

    size: Annotated[int, Field(ge=0)] = 0
    """Largest number of actors; 0 is one for each free CPU (or GPU, if they use one)."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs per actor."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs per actor."""


class Pixels(Section):
    """How pictures become pixels. Palette and token store must agree on it."""

    n_px: Annotated[int, Field(gt=0, le=224)] = 32
    """Pixels a side."""
    crop: Literal["random", "centre"] = "random"
    """Training views, and what is held out of them: the paper's random crops, or the evaluation view. Other splits
    always take the centre."""
    pipeline: Literal["fast", "reference"] = "fast"
    """How they are decoded and resized: in one step on a smaller JPEG, or step by step with PIL, three times slower."""


class Palette(Section):
    """Fit a palette to the training split of a folder or bucket of images."""

    source: Uri
    """URI of images in one of the layouts below."""
    layout: Layout | None = None
    """Class folders, Kaggle's ImageNet, the original tars, WebDataset or Hugging Face's Parquet; None: recognise it."""
    out: Uri
    """URI of the palette to write, a .npy; beside it a .json says how it was made, and a .png shows the colours."""
    k: Annotated[int, Field(ge=2, le=65536)] = 512
    """Colours."""
    images: Count = 10_000
    """About how many images are sampled."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds the sample and the clustering."""
    gpu: bool = False
    """Cluster on the GPUs of the machine that runs the job; needs the extra [gpu]."""
    pixels: Pixels = Pixels()
    pool: Pool = Pool()


class Prepare(Section):
    """Turn a folder or bucket of images into a committed token store."""

    source: Uri
    """URI of images in one of the layouts below."""
    layout: Layout | None = None
    """Class folders, Kaggle's ImageNet, the original tars, WebDataset or Hugging Face's Parquet; None: recognise it."""
    palette: PaletteUri
    """URI of the palette (.npy), or the word openai for OpenAI's own 512 colours."""
    tokens: Uri
    """URI of the token store to write, or to complete."""
    views: Count = 1
    """Differently cropped copies of the training split; epoch e reads view e mod views."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training images, drawn by key, that becomes the split holdout, to choose settings by. Paper: 4 %."""
    shard_images: Count = 10_000
    """Images per shard."""
    budget: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of images that may be unreadable (they go to quarantine) before the job fails."""
    pixels: Pixels = Pixels()
    pool: Pool = Pool()


class Verify(Section):
    """Check every byte of a token store, and that its shards are what the source gives."""

    tokens: Uri
    """URI of a token store."""
    remake: Annotated[int, Field(ge=0)] = 1
    """How many shards, spread over the store, are made again from the source and compared."""
    remove: bool = False
    """Remove shards and quarantine lists that the manifest does not name, and what killed writes left behind."""
    pool: Pool = Pool()


class Convert(Section):
    """Carry weights from one format to another: OpenAI's, transformers', and our releases."""

    source: Uri
    """URI of a release, of a folder of transformers, or of OpenAI's checkpoint without `.index`."""
    out: Uri
    """URI of the folder to write."""
    to: Literal["release", "transformers"] = "release"
    """Format to write."""
    palette: PaletteUri | None = None
    """URI of the palette (.npy), or the word openai; None: what the source holds (OpenAI's checkpoints hold none)."""
    pipeline: Literal["fast", "reference"] = "reference"
    """Pixel pipeline to give a release. The one behind foreign weights was never published; this is what images will
    be prepared with."""


class Evaluate(Section):
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
    pool: Pool = Pool()


class Work(Section):
    """Pictures, and who is asked about them: what scoring and completing have in common."""

    release: OptionalUri = ""
    """URI of a release; or ask a server."""
    endpoint: str = ""
    """URL of a server to ask instead, http://host:8000; its key is in the environment variable IGPT_KEY."""
    model: str = ""
    """Which of the server's models; empty is its first."""
    tokens: OptionalUri = ""
    """URI of a token store; or take images."""
    source: OptionalUri = ""
    """URI of a folder or bucket of images instead, in any layout that jobs/prepare.py reads."""
    layout: Layout | None = None
    """Of those images; None recognises it."""
    split: str = "test"
    """Split to take."""
    unit_images: Count = 1000
    """Images of a unit of work, of images in folders: each becomes a file. Of a token store it is a shard."""
    pool: Pool = Pool()

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if bool(self.release) == bool(self.endpoint):
            raise ValueError("name who is asked: --release or --endpoint, one of them")
        if bool(self.tokens) == bool(self.source):
            raise ValueError("name the pictures: --tokens or --source, one of them")
        return self


class Score(Work):
    """Nats of every image of a split, to Parquet."""

    out: Uri
    """URI of the folder to write, or to complete: a Parquet file per unit with key, label, nats."""
    batch_size: Count = 64
    """Images per forward pass."""


class Features(Section):
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
    pool: Pool = Pool()


class Sgd(Section):
    """The paper's way to fit a probe on ImageNet: momentum 0.9, a cosine to zero, the best of some learning rates."""

    steps: Count = 1_000_000
    """Steps."""
    batch_size: Count = 128
    """Images per step; not stated in the paper."""
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = (30, 10, 3, 1, 0.3, 0.1)
    """Learning rates, all fitted side by side on the same batches; the paper names 30, 10, 3, ..."""


class Probe(Section):
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
    sgd: Sgd = Sgd()
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
    pool: Pool = Pool()


class Complete(Work):
    """Finish the lower part of pictures."""

    out: Uri
    """URI of the folder to write: completions.parquet and .png; of all pictures, both for each unit."""
    images: Annotated[int, Field(ge=0)] = 8
    """Pictures of a token store, spread evenly over the split; 0 is all. Of --source always all."""
    n: Annotated[int, Field(ge=1, le=16)] = 4
    """Completions of each."""
    rows: Annotated[int, Field(ge=0)] | None = None
    """Rows of pixels that are given; None is half of them."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Divides the logits; 0 takes the likeliest colour."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample among the k likeliest colours; 0 is all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest colours that together have this probability."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds the samples; each has its own stream, so neighbours in a batch do not matter."""
    lanes: Annotated[int, Field(ge=16)] = 32
    """Pictures that a worker paints at once."""


class Serve(Section):
    """Serve releases over HTTP."""

    release: Named = ()
    """Releases, each a URI or name=URI; the name is what requests call it by. The first answers who names none."""
    heads: Named = ()
    """Probes that POST /v1/classify offers, each the `out` folder of jobs/probe.py or name=URI. They go to the release
    they were fitted on; a fine-tuned release brings its own."""
    keys: str = ""
    """Who may ask: env:NAME or the URI of a file, with a line for each key, its sha256 and a name."""
    open: bool = False
    """Ask for no key. Only on a loopback address."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    """Port to listen on."""
    replicas: Count = 1
    """Copies of each model."""
    lanes: Count = 32
    """Pictures that a copy paints at once; a request for n of them takes n."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of the weights that paint; scores, features and classes stay float32, as evaluation is."""
    queue: Count = 256
    """Requests that may wait or be worked on; the next is answered 429."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs per replica."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs per replica."""
    check: OptionalUri = ""
    """A file for `serve deploy` to check instead: every key, and what it serves. Nothing is started."""

    @model_validator(mode="after")
    def _someone_may_ask(self) -> Self:
        if self.check:
            return self
        if not self.release:
            raise ValueError("no release to serve: name one with --release")
        if self.open == bool(self.keys):
            raise ValueError(
                "say who may ask: --keys env:NAME or a file of hashed keys, or --open for a loopback address"
            )
        if self.open and not is_loopback(self.host):
            raise ValueError(
                f"--open asks nobody for a key, so --host {self.host} must be a loopback address: give --keys"
            )
        return self

    @property
    def releases(self) -> dict[str, str]:
        return dict(named.split("=", 1) for named in self.release)

    @property
    def probes(self) -> dict[str, str]:
        return dict(named.split("=", 1) for named in self.heads)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Watch(Section):
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


class Demo(Section):
    """The whole path on handwritten digits, on this machine."""

    out: Uri = storage.absolute("demo-out")
    """Folder for the report, the figure and (with the local store) all data. Its earlier content is replaced."""
    store: Literal["local", "s3"] = "local"
    """Keep the data in files below `out`, or in an S3 server on loopback under a random key."""
    steps: Count = 330
    """Training steps."""
    workers: Count = 2
    """Training workers."""


class BenchPalette(Section):
    """Compare ways to fit a palette, and time the look-up of colours."""

    images: Uri
    """URI of images; a fifth of them is held out, another in each round."""
    n_px: Annotated[int, Field(gt=0, le=224)] = 128
    """Pixels a side; more than in training, so that few images give many pixels."""
    pixels: Count = 1_000_000
    """Pixels to fit to."""
    k: Annotated[int, Field(ge=2, le=65536)] = 512
    """Colours."""
    rounds: Count = 5
    """How often each way is tried."""
    encode_pixels: Count = 10_000_000
    """Pixels to look up."""


class BenchData(Section):
    """From JPEG files to token shards, beside the JPEG decoder alone, PIL and transformers."""

    images: Uri
    """URI of JPEG files on this machine; they are repeated to the numbers below."""
    n_px: Annotated[int, Field(gt=0, le=224)] = 32
    """Pixels a side."""
    n: Count = 16_000
    """Images that each way works through in a round: enough for actors to be warm for most of them."""
    rounds: Count = 3
    """How often each way is tried."""
    whole: tuple[Count, ...] = (1000, 100_000)
    """Images of whole preparations, whose memory should not grow with them."""


class BenchModern(Section):
    """Train the paper's recipe, the modern one, and each switch between them, on the same tokens."""

    tokens: Uri
    """URI of a token store; `make demo` leaves one of digits in demo-out/data/tokens."""
    out: Uri
    """File for the curves of all runs; those already in it are not run again."""
    split: str = "train"
    """Split to train on."""
    held_out: str = "test"
    """Split to judge by."""
    n_layer: Count = 4
    """Blocks."""
    n_embd: Count = 64
    """Width."""
    n_head: Count = 2
    """Attention heads."""
    batch_size: Count = 32
    """Images per step."""
    steps: Count = 300
    """Steps of every run."""
    warmup_steps: Count = 30
    """Steps of linear warm-up."""
    evaluate_every: Count = 20
    """Steps between looks at the held-out split."""
    seeds: Count = 2
    """How often each run is repeated, with other weights and another order."""


class BenchCheckpoints(Section):
    """What checkpoints add to a run, stored beside its steps or waited for."""

    place: OptionalUri = ""
    """URI of a folder or bucket to store them in; empty is a temporary folder."""
    n_embd: Count = 256
    """Width of the network, of 8 blocks at 16x16."""
    images: Count = 2
    """Images of a step."""
    steps: Count = 20
    """Steps for each checkpoint."""
    rounds: Count = 9
    """How often each way is tried."""
    threads: Count = 1
    """Threads of a step."""


class BenchOverheads(Section):
    """What FSDP2, the loader and Ray Train add to a step of one worker, and how two divide its state."""

    tokens: Uri
    """URI of a token store; `make demo` leaves one of digits in demo-out/data/tokens."""
    split: str = "train"
    """Split to train on."""
    n_embd: Count = 256
    """Width of the network, of 8 blocks."""
    images: Count = 64
    """Images of a step."""
    steps: Count = 40
    """Steps of every run."""
    rounds: Count = 3
    """How often the loop runs, alone and under Ray Train."""


class BenchTrain(Section):
    """A training step beside other networks of the same shape."""

    shapes: tuple[str, ...] = ("small", "layer")
    """Of small (4 layers x 128, 256 tokens), layer (one of iGPT-S's), igpt-s, igpt-m, igpt-l."""
    rounds: Count = 15
    """How often each network takes its turn; figures are medians."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    threads: Count = 2
    """Of torch, on the CPU."""
    mingpt: OptionalUri = ""
    """A checkout of karpathy/minGPT, to have it take part."""


class BenchProbe(Section):
    """Fit a probe beside scikit-learn's logistic regression."""

    features: OptionalUri = ""
    """URI of features; empty makes up some that are correlated as a network's are."""
    split: str = "train"
    """Split of those features."""
    layer: int = 0
    """Layer of those features."""
    rows: Count = 50_000
    """Images made up."""
    width: Count = 512
    """Features of each."""
    classes: Annotated[int, Field(ge=2)] = 10
    """Classes."""
    l2: Annotated[float, Field(gt=0)] = 1e-4
    """Penalty, l2 / 2 * |W|^2 beside the mean loss."""
    rounds: Count = 3
    """How often each takes its turn; figures are quartiles."""
    threads: Count = 2
    """Of both."""


class BenchFeatures(Section):
    """Features of the first layers of iGPT-S beside transformers' with all hidden states."""

    n_layer: Count = 24
    """Blocks of the network."""
    last_layer: Annotated[int, Field(ge=0)] = 12
    """The last layer wanted; its features take this many blocks."""
    images: Count = 4
    """Images of a forward pass."""
    rounds: Count = 5
    """How often each takes its turn; figures are medians."""
    threads: Count = 2
    """Of torch."""


class BenchServe(Section):
    """Finish pictures beside transformers and without a cache, and under load with continuous and fixed batches."""

    n_layer: Count = 24
    """Blocks of the network."""
    n_embd: Count = 512
    """Its width."""
    n_head: Count = 8
    """Its attention heads."""
    n_px: Count = 32
    """Pixels a side; the upper half of a picture is given."""
    pixels: Annotated[int, Field(ge=2)] = 512
    """Of the lower half, the first so many are drawn. All of them, unless time is short."""
    batches: tuple[Count, ...] = (1, 8, 32)
    """Pictures at once."""
    rounds: Count = 1
    """How often each way takes its turn; figures are medians."""
    threads: Count = 2
    """Of torch, on the CPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    lanes: Count = 8
    """Of the engine under load."""
    precision: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Of the engine under load."""
    requests: Count = 40
    """That come under load, of one sample each."""
    load: Annotated[float, Field(gt=0)] = 0.6
    """How fast they come, as a share of what the engine finishes with all lanes in use."""


# ------------------------------------------------------------------------------------------------ report and audit


class Report(Section):
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
    finetuning: Finetuning = Finetuning()
    """How. The folder of these runs is finetuning/ in `out`, and one of them is from scratch, whatever is said here."""
    images: Count = 8
    """Pictures that are completed, spread evenly over the split."""
    n: Count = 4
    """Completions of each."""
    batch_size: Count = 64
    """Images per forward pass."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds the probe's held-out fifth, the few labels, the untrained network, and the completions."""
    pool: Pool = Pool()


class Audit(Section):
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
    pool: Pool = Pool()


# ------------------------------------------------------------------------------------------------ provenance


def provenance(settings: BaseModel) -> dict[str, Any]:
    """What is written beside every artefact: resolved settings, package versions, git revision."""
    packages = ("igpt_ray", "ray", "torch", "faiss-cpu", "faiss-gpu", "pyarrow", "numpy", "pillow")
    versions = {p: v for p in packages if (v := _version(p)) is not None}
    return {"settings": settings.model_dump(mode="json"), "versions": versions, "git": _git_revision()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """None in an installed package and in a Ray job's working directory, which carries no .git."""
    here = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    if not (here / ".git").exists():
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
