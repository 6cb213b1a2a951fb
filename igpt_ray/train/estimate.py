"""Estimate of a run: parameters, FLOPs, memory per worker, traffic, hours and cost.

`lines` shows the arithmetic behind every number. FLOPs count matrix products only, forward and backward (three times
the forward pass). There are two counts of attention: full, as in the usual formulas and in torch's counter, and causal,
as computed by a flash kernel. MFU uses the causal count.
"""

from dataclasses import dataclass

from igpt_ray.model.config import ModelConfig
from igpt_ray.settings import Result
from igpt_ray.train.config import ClusterConfig, DeviceName, EstimateConfig, OptimConfig, PretrainConfig, WorkersConfig
from igpt_ray.train.optim import ROUNDS

GB = 1e9
SAVED_WIDTHS = 16
"""Elements that a block saves per position for its backward pass on a GPU, in widths C: input and output of both norms
(4), q, k, v (3), attention (1), and c_fc's output and its GELU (4 each). The numbers per row of norms and attention are
less than 1 %."""
MODERN_WIDTHS = 3
"""More with normalised or rotated queries and keys: these (2), and a copy of attention's output in another layout (1).
The norms' inputs are the q and k above."""
PRODUCT_WIDTHS = 11
"""The same with selective activation checkpointing: the block's input (1) and the outputs of matrix products: q, k, v
(3), attention (1), its projection (1), and the MLP's two (4 and 1)."""
SAMPLES = 24
"""Slots of the KV cache of `monitor.draw_samples`."""


@dataclass(frozen=True)
class Device:
    """An accelerator's data sheet (NVIDIA, SXM)."""

    tflops: float
    """Dense bf16."""
    memory_gb: float


DEVICES: dict[DeviceName, Device] = {
    "a100": Device(312, 80),
    "h100": Device(989, 80),
    "h200": Device(989, 141),
    "b200": Device(2250, 180),
}


def flops_per_token(model: ModelConfig, causal: bool) -> int:
    """FLOPs per token of a forward and backward pass: 6 per weight of a matrix product, and attention.

    A masked network always has full attention.
    """
    d, n = model.n_embd, model.n_positions
    products = 6 * (12 * model.n_layer * d * d + model.n_vocab * d)
    attention = 12 * model.n_layer * d * n
    return products + (attention // 2 if causal and model.objective == "next" else attention)


def muon_flops(model: ModelConfig) -> int:
    """FLOPs of Muon per step: for every matrix X, ROUNDS times X X', its square, and the product of both with X."""
    d = model.n_embd
    shapes = 4 * [(d, d)] + 2 * [(d, 4 * d)]  # q, k, v, c_proj; c_fc, c_proj
    return model.n_layer * ROUNDS * sum(4 * m * m * n + 2 * m**3 for m, n in shapes)


def flops_per_step(model: ModelConfig, optim: OptimConfig, causal: bool) -> int:
    """FLOPs per step, summed over all workers."""
    muon = muon_flops(model) if optim.muon_lr is not None else 0
    return optim.batch_size * model.n_positions * flops_per_token(model, causal) + muon


def state_bytes(model: ModelConfig, optim: OptimConfig, fsdp_size: int, passes: int = 1) -> float:
    """Bytes of a worker's shard of float32 weights, gradients, and Adam's two moments or Muon's one.

    With several passes, FSDP2 accumulates unsharded gradients. Fused Adam needs no temporary tensors.
    """
    one_moment = 12 * model.n_layer * model.n_embd**2 if optim.muon_lr is not None else 0
    return 4 * ((3 * model.n_params - one_moment) / fsdp_size + model.n_params / (fsdp_size if passes == 1 else 1))


def gathered_bytes(model: ModelConfig, width: int) -> float:
    """Bytes of gathered weights: two blocks (one in use, one prefetched), the embeddings and the output layer."""
    d = model.n_embd
    block = 12 * d * d + 2 * d
    return width * (2 * block + model.n_params - model.n_layer * block)


def block_bytes(model: ModelConfig, width: int) -> int:
    """Bytes per position that a block saves for its backward pass, divided by the width C."""
    return width * (SAVED_WIDTHS + (MODERN_WIDTHS if model.modern else 0))


def activation_bytes(model: ModelConfig, images: int, width: int, activation_checkpointing: str = "none") -> float:
    """Bytes of the activations of one forward pass on a GPU: tensors saved by blocks and ln_f; the logits in the
    precision of the step, and in float32 with their gradient. Compiled blocks save less.

    With activation checkpointing, every block saves its input (full) or its matrix products (selective), and one block
    at a time saves all activations.
    """
    block = block_bytes(model, width)
    saved = {"none": block, "selective": PRODUCT_WIDTHS * width, "full": width}[activation_checkpointing]
    widths = model.n_layer * saved + (0 if activation_checkpointing == "none" else block) + 2 * width
    return images * model.n_positions * (model.n_embd * widths + model.n_vocab * (width + 8))


def sample_bytes(settings: PretrainConfig) -> float:
    """Bytes for `run.sample_every` on worker 0, between steps: the unsharded network and a KV cache."""
    if settings.run.sample_every is None:
        return 0.0
    model = settings.model
    cache = 2 * SAMPLES * model.n_layer * model.n_positions * model.n_embd
    return float(width_of(settings.workers) * (model.n_params + cache))


def memory_bytes(settings: PretrainConfig, images: int, passes: int) -> dict[str, float]:
    """Bytes on a worker at the peak of a step, by purpose."""
    model, workers = settings.model, settings.workers
    width = width_of(workers)
    return {
        "weights_gradients_adam": state_bytes(model, settings.optim, workers.fsdp_size, passes),
        "gathered_weights": gathered_bytes(model, width),
        "activations": activation_bytes(model, images, width, workers.activation_checkpointing),
    }


def images_that_fit(settings: PretrainConfig, share: int, memory: float) -> int:
    """Largest micro-batch, at most `share` images, with which a step fits in 0.9 of `memory` bytes; at least 1."""
    if sum(memory_bytes(settings, share, passes=1).values()) <= 0.9 * memory:
        return share
    one, two = (memory_bytes(settings, images, passes=2) for images in (1, 2))
    each = two["activations"] - one["activations"]
    return max(1, min(share, 1 + int((0.9 * memory - sum(one.values())) / each)))


def images_per_pass(settings: EstimateConfig) -> tuple[int, int]:
    """A worker's micro-batch, and the number of micro-batches per step."""
    micro_batch = settings.workers.micro_batch
    share = -(-settings.optim.batch_size // settings.workers.n)
    if micro_batch == "auto":
        micro_batch = images_that_fit(settings, share, DEVICES[settings.cluster.device].memory_gb * GB)
    passes = -(-share // min(micro_batch, share))
    return -(-share // passes), passes


def buses(workers: WorkersConfig, cluster: ClusterConfig) -> tuple[float, float]:
    """GB/s of the ring of an FSDP group, and of the ring over the replicas of a shard.

    A ring over whole nodes has their full network bandwidth. The rings over replicas divide it, one per shard on a
    node.
    """
    per_node = cluster.devices_per_node
    shard_bus = cluster.node_gb_per_second if workers.fsdp_size <= per_node else cluster.bus_gb_per_second
    return shard_bus, cluster.bus_gb_per_second / min(workers.fsdp_size, per_node)


def width_of(workers: WorkersConfig) -> int:
    """Bytes of an element in `workers.precision`."""
    return 2 if workers.precision == "bfloat16" else 4


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its CUDA name, such as "NVIDIA H200"; None if it is not in `DEVICES`."""
    return next((sheet.tflops * 1e12 for name, sheet in DEVICES.items() if name in device.lower()), None)


class Estimate(Result):
    """FLOPs are of forward and backward passes, with full attention unless the name has `causal`."""

    n_params: int
    tokens_per_step: int
    tokens: int
    """Of all steps."""
    flops_per_token: int
    flops_per_token_causal: int
    flops: int
    """Of all steps, Muon's included."""
    workers: int
    images_per_pass: int
    """Images in a worker's micro-batch."""
    passes_per_step: int
    """Micro-batches per step."""
    memory_gb: dict[str, float]
    """Per worker: weights_gradients_adam, gathered_weights, activations; and samples, between steps on worker 0."""
    memory_gb_total: float
    """At the peak, in a step or while samples are drawn."""
    memory_gb_there: float
    """Memory of the device."""
    fits: bool
    """Whether the total is less than 0.9 of the device's memory."""
    step_seconds: float
    """Time of the computation of a step."""
    traffic_gb_per_step: float
    """Sent by a worker in its FSDP group."""
    traffic_gb_between_copies: float
    """Sent by a worker to the replicas of its shard."""
    traffic_seconds: float
    """Time of the traffic of a step."""
    tokens_per_second: int
    hours: float
    device_hours: float
    dollars: float | None
    """None without a price."""


def estimate(settings: EstimateConfig) -> Estimate:
    model, optim, workers, cluster = settings.model, settings.optim, settings.workers, settings.cluster
    device = DEVICES[cluster.device]
    width = width_of(workers)
    images, passes = images_per_pass(settings)
    tokens_per_step = optim.batch_size * model.n_positions
    full, causal = (flops_per_token(model, causal) for causal in (False, True))
    memory = memory_bytes(settings, images, passes)
    samples = sample_bytes(settings)
    total = max(sum(memory.values()), memory["weights_gradients_adam"] + samples)
    recompute = 4 / 3 if workers.activation_checkpointing == "full" else 1  # backward costs two forward passes
    work = recompute * flops_per_step(model, optim, causal=True)
    step_seconds = work / (workers.n * device.tflops * 1e12 * cluster.mfu)
    fsdp_size, replicas = workers.fsdp_size, workers.n // workers.fsdp_size
    shard_bus, replica_bus = buses(workers, cluster)
    # In a ring, each worker sends all but its own part: of weights in the forward and the backward pass, of gradients;
    # and twice in the all-reduce over replicas.
    traffic = (fsdp_size - 1) / fsdp_size * model.n_params * (2 * width * passes + 4)
    between = 2 * (replicas - 1) / replicas * model.n_params * 4 / fsdp_size
    traffic_seconds = traffic / (shard_bus * GB) + between / (replica_bus * GB)
    hours = optim.steps * max(step_seconds, traffic_seconds) / 3600
    return Estimate(
        n_params=model.n_params,
        tokens_per_step=tokens_per_step,
        tokens=optim.steps * tokens_per_step,
        flops_per_token=full,
        flops_per_token_causal=causal,
        flops=optim.steps * flops_per_step(model, optim, causal=False),
        workers=workers.n,
        images_per_pass=images,
        passes_per_step=passes,
        memory_gb={name: round(value / GB, 3) for name, value in [*memory.items(), ("samples", samples)]},
        memory_gb_total=round(total / GB, 3),
        memory_gb_there=device.memory_gb,
        fits=total < 0.9 * device.memory_gb * GB,
        step_seconds=step_seconds,
        traffic_gb_per_step=round(traffic / GB, 3),
        traffic_gb_between_copies=round(between / GB, 3),
        traffic_seconds=traffic_seconds,
        tokens_per_second=round(tokens_per_step / max(step_seconds, traffic_seconds)),
        hours=round(hours, 2),
        device_hours=round(hours * workers.n, 1),
        dollars=None if cluster.price is None else round(hours * workers.n * cluster.price, 2),
    )


def lines(settings: EstimateConfig, result: Estimate) -> list[str]:
    """The estimate as a table: quantity, value, arithmetic."""
    m, o, w, c, r = settings.model, settings.optim, settings.workers, settings.cluster, result
    device, width, (shard_bus, replica_bus) = DEVICES[c.device], width_of(w), buses(w, c)
    gb = {name: f"{value:.2f} GB" for name, value in r.memory_gb.items()}
    muon = o.muon_lr is not None
    causal = "6 (12 L d^2 + V d) + 6 L n d: as computed"
    remedy = "more workers, a smaller --workers.micro-batch, or --workers.activation-checkpointing selective or full"
    traffic = f"{r.traffic_gb_per_step:.3g} GB at {shard_bus:g} GB/s"
    if w.fsdp_size < w.n:
        traffic += f" and {r.traffic_gb_between_copies:.3g} GB at {replica_bus:g} GB/s between replicas"
    hidden = "hidden" if r.traffic_seconds <= r.step_seconds else "the LIMIT"
    activations = f"{r.images_per_pass} images x {m.n_positions}"
    activations += f" x ({_blocks(m, w, width)} + {2 * width} d + {width + 8} V) bytes"
    step = f"{'4/3 ' if w.activation_checkpointing == 'full' else ''}causal FLOPs"
    step += f" / ({w.n} x {device.tflops:g} TFLOP/s x {c.mfu:g}), {r.passes_per_step} pass(es)"
    rows = [
        ("parameters", f"{r.n_params:,}", f"{m.n_layer} blocks x {m.n_embd}, {m.n_px}x{m.n_px}"),
        ("tokens", f"{r.tokens:.4g}", f"{o.steps:,} steps x {o.batch_size} images x {m.n_positions}"),
        ("FLOPs per token", f"{r.flops_per_token:.4g}", "6 (12 L d^2 + V d) + 12 L n d: full attention"),
        (
            "  causal",
            f"{r.flops_per_token_causal:.4g}",
            causal if m.objective == "next" else "the same: a masked network has full attention",
        ),
        ("FLOPs", f"{r.flops:.4g}", "full attention" + (", including Muon" if muon else "")),
        (
            "memory per worker",
            f"{r.memory_gb_total:.2f} GB",
            f"of {device.memory_gb:g} GB: {'fits' if r.fits else f'does NOT fit: use {remedy}'}",
        ),
        (
            "  between steps",
            gb["weights_gradients_adam"],
            _state(w.fsdp_size, muon, r.passes_per_step),
        ),
        ("  gathered", gb["gathered_weights"], f"{width} bytes x (2 blocks + embeddings, output layer)"),
        ("  activations", gb["activations"], activations),
        *([("  samples", gb["samples"], "worker 0: network and KV cache")] if r.memory_gb["samples"] else []),
        ("step", f"{r.step_seconds:.4g} s", step),
        ("traffic", f"{r.traffic_seconds:.4g} s", f"{traffic} per worker and step, {hidden}"),
        ("speed", f"{r.tokens_per_second:,} tokens/s", "over all workers"),
        ("time", f"{r.hours:,} h", f"{r.device_hours:,} {c.device} hours"),
    ]
    if c.price is not None:
        rows.append(("cost", f"${r.dollars:,}", f"at ${c.price:g} per {c.device} hour"))
    return [f"{name:18} {value:>20}   {arithmetic}" for name, value, arithmetic in rows]


def _state(fsdp_size: int, muon: bool, passes: int) -> str:
    """`state_bytes` as a formula."""
    sharded = f"{16 if passes == 1 else 12} bytes{' (4 less in the blocks: Muon)' if muon else ''}"
    unsharded = "" if passes == 1 else " + 4 bytes x parameters: unsharded gradients"
    return f"{sharded} x parameters / {fsdp_size} workers{unsharded}"


def _blocks(model: ModelConfig, workers: WorkersConfig, width: int) -> str:
    """The blocks' part of `activation_bytes`, as a formula."""
    block = block_bytes(model, width)
    if workers.activation_checkpointing == "none":
        return f"{block} L d"
    return f"{width * (PRODUCT_WIDTHS if workers.activation_checkpointing == 'selective' else 1)} L d + {block} d"
