"""What a run will take, before it starts: parameters, FLOPs, memory of a worker, traffic, hours, money.

Every figure is arithmetic that a reader can repeat; `lines` shows it. FLOPs count matrix products only, forward and
backward (three times the forward). Attention is counted twice: in full, as formulas usually do and as torch's counter
does, and causally, which is what a flash kernel computes; MFU is given by the second.
"""

from dataclasses import dataclass
from typing import Any

from igpt_ray.model.config import ModelConfig
from igpt_ray.train.config import ClusterConfig, DeviceName, EstimateConfig, OptimConfig, WorkersConfig
from igpt_ray.train.optim import ROUNDS

GB = 1e9
SAVED_WIDTHS = 18
"""What a block keeps of each position for its backward pass, in widths C: what ln_1 gives (1), q, k, v (3), attention
(1), what ln_2 gives (1), and three times 4C in the MLP."""
PRODUCT_WIDTHS = 11
"""What a block keeps of each position if it makes the rest again: what goes into it (1), and what products give: q, k
and v (3), attention (1), its projection (1), and the MLP's two (4 and 1)."""
SAVED_FLOAT32_WIDTHS = 4
"""And always in float32: what goes into each norm, and what it is before its gain."""


@dataclass(frozen=True)
class Device:
    """An accelerator by its data sheet (NVIDIA's, SXM form)."""

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
    """Of one training step, forward and backward: 6 for each weight that multiplies, and attention.

    A masked network attends in full in any case.
    """
    d, n = model.n_embd, model.n_positions
    products = 6 * (12 * model.n_layer * d * d + model.n_vocab * d)
    attention = 12 * model.n_layer * d * n
    return products + (attention // 2 if causal and model.objective == "next" else attention)


def muon_flops(model: ModelConfig) -> int:
    """Of Muon in one step, on any batch: ROUNDS of X X', its square, and their product with X, for every matrix."""
    d = model.n_embd
    shapes = 4 * [(d, d)] + 2 * [(d, 4 * d)]  # q, k, v, c_proj; c_fc, c_proj
    return model.n_layer * ROUNDS * sum(4 * m * m * n + 2 * m**3 for m, n in shapes)


def flops_per_step(model: ModelConfig, optim: OptimConfig, causal: bool) -> int:
    """Of all workers together."""
    muon = muon_flops(model) if optim.muon_lr is not None else 0
    return optim.batch_size * model.n_positions * flops_per_token(model, causal) + muon


def state_bytes(model: ModelConfig, optim: OptimConfig, fsdp_size: int) -> float:
    """Of a worker's shard at rest, one of `fsdp_size`: float32 weights, gradients, and Adam's two moments, or Muon's
    one."""
    one_moment = 12 * model.n_layer * model.n_embd**2 if optim.muon_lr is not None else 0
    return 4 * (4 * model.n_params - one_moment) / fsdp_size


def gathered_bytes(model: ModelConfig, width: int) -> float:
    """Of weights in the type of the step: two blocks (one at work, one on its way), and what stays gathered."""
    d = model.n_embd
    block = 12 * d * d + 2 * d
    return width * (2 * block + model.n_params - model.n_layer * block)


def block_bytes(model: ModelConfig, width: int) -> int:
    """What a block saves of each position for its backward pass, in bytes per width C.

    Queries and keys that were normed or turned lie beside the c_attn output that the values still need, and
    attention's output is copied; their norms save as any norm, but in float32 the input is there already.
    """
    widths, float32_widths = SAVED_WIDTHS, SAVED_FLOAT32_WIDTHS
    if model.modern:
        widths += 3
    if model.qk_norm:
        float32_widths += 4 if width < 4 else 2
    return widths * width + float32_widths * 4


def activation_bytes(model: ModelConfig, images: int, width: int, activation_checkpointing: str = "none") -> float:
    """Bytes of the activations of one forward pass: tensors saved by blocks and ln_f, and the logits in the
    precision of the step and in float32, with their gradient.

    With activation checkpointing, every block keeps its input (full) or its matrix products (selective), and one block
    at a time keeps all activations.
    """
    block = block_bytes(model, width)
    kept = {"none": block, "selective": PRODUCT_WIDTHS * width, "full": width}[activation_checkpointing]
    widths = model.n_layer * kept + (0 if activation_checkpointing == "none" else block) + width + 2 * 4
    return images * model.n_positions * (model.n_embd * widths + model.n_vocab * (2 * width + 4))


def images_that_fit(model: ModelConfig, optim: OptimConfig, workers: WorkersConfig, share: int, memory: float) -> int:
    """The most of a worker's `share` of a batch that one forward pass takes in 0.9 of `memory` bytes; at least 1."""
    width = width_of(workers)
    left = 0.9 * memory - state_bytes(model, optim, workers.fsdp_size) - gathered_bytes(model, width)
    return max(1, min(share, int(left / activation_bytes(model, 1, width, workers.activation_checkpointing))))


def images_per_pass(settings: EstimateConfig) -> tuple[int, int]:
    """Images that a worker takes at once, and how often in a step."""
    workers, batch_size = settings.workers, settings.optim.batch_size
    share, memory = -(-batch_size // workers.n), DEVICES[settings.cluster.device].memory_gb * GB
    fitting = images_that_fit(settings.model, settings.optim, workers, share, memory)
    passes = -(-share // min(fitting if workers.micro_batch == "auto" else workers.micro_batch, share))
    return -(-share // passes), passes


def buses(workers: WorkersConfig, cluster: ClusterConfig) -> tuple[float, float]:
    """GB/s of the workers that share the weights, and of those that hold copies of one share of them.

    A ring over whole nodes has all of their network; groups of copies share it, one for each share on a node.
    """
    here = cluster.devices_per_node
    fsdp_size = cluster.node_gb_per_second if workers.fsdp_size <= here else cluster.bus_gb_per_second
    return fsdp_size, cluster.bus_gb_per_second / min(workers.fsdp_size, here)


def width_of(workers: WorkersConfig) -> int:
    """Bytes of a number inside the step."""
    return 2 if workers.precision == "bfloat16" else 4


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name that CUDA gives it ("NVIDIA H200"); None if its sheet is not here."""
    return next((sheet.tflops * 1e12 for name, sheet in DEVICES.items() if name in device.lower()), None)


def estimate(settings: EstimateConfig) -> dict[str, Any]:
    """Everything, for `settings` on `settings.cluster`, as plain numbers."""
    model, optim, workers, cluster = settings.model, settings.optim, settings.workers, settings.cluster
    device = DEVICES[cluster.device]
    width = width_of(workers)
    images, passes = images_per_pass(settings)
    tokens_per_step = optim.batch_size * model.n_positions
    full, causal = (flops_per_token(model, causal) for causal in (False, True))
    memory = {
        "weights_gradients_adam": state_bytes(model, optim, workers.fsdp_size),
        "gathered_weights": gathered_bytes(model, width),
        "activations": activation_bytes(model, images, width, workers.activation_checkpointing),
    }
    passes_done = (
        4 if workers.activation_checkpointing == "full" else 3
    ) / 3  # forward, backward (twice the work), forward again
    work = passes_done * flops_per_step(model, optim, causal=True)
    step_seconds = work / (workers.n * device.tflops * 1e12 * cluster.mfu)
    fsdp_size, copies = workers.fsdp_size, workers.n // workers.fsdp_size
    bus, bus_between = buses(workers, cluster)
    # In a ring each worker hands on all but its own share: of weights there, weights back, gradients; of sums, twice.
    traffic = (fsdp_size - 1) / fsdp_size * model.n_params * (2 * width * passes + 4)
    between = 2 * (copies - 1) / copies * model.n_params * 4 / fsdp_size
    traffic_seconds = traffic / (bus * GB) + between / (bus_between * GB)
    seconds = optim.steps * max(step_seconds, traffic_seconds)
    hours = seconds / 3600
    return {
        "n_params": model.n_params,
        "tokens_per_step": tokens_per_step,
        "tokens": optim.steps * tokens_per_step,
        "flops_per_token": full,
        "flops_per_token_causal": causal,
        "flops": optim.steps * flops_per_step(model, optim, causal=False),
        "workers": workers.n,
        "images_per_pass": images,
        "passes_per_step": passes,
        "memory_gb": {name: round(value / GB, 3) for name, value in memory.items()},
        "memory_gb_total": round(sum(memory.values()) / GB, 3),
        "memory_gb_there": device.memory_gb,
        "fits": sum(memory.values()) < 0.9 * device.memory_gb * GB,
        "step_seconds": step_seconds,
        "traffic_gb_per_step": round(traffic / GB, 3),
        "traffic_gb_between_copies": round(between / GB, 3),
        "traffic_seconds": traffic_seconds,
        "tokens_per_second": round(tokens_per_step / max(step_seconds, traffic_seconds)),
        "hours": round(hours, 2),
        "device_hours": round(hours * workers.n, 1),
        "dollars": None if cluster.price is None else round(hours * workers.n * cluster.price, 2),
    }


def lines(settings: EstimateConfig, found: dict[str, Any]) -> list[str]:
    """The table: what, how much, and the arithmetic behind it."""
    m, o, w, c = settings.model, settings.optim, settings.workers, settings.cluster
    device, memory = DEVICES[c.device], found["memory_gb"]
    width = width_of(w)
    rows = [
        ("parameters", f"{found['n_params']:,}", f"{m.n_layer} blocks x {m.n_embd}, {m.n_px}x{m.n_px}"),
        ("tokens", f"{found['tokens']:.4g}", f"{o.steps:,} steps x {o.batch_size} images x {m.n_positions}"),
        ("FLOPs per token", f"{found['flops_per_token']:.4g}", "6 (12 L d^2 + V d) + 12 L n d: attention in full"),
        ("  causal", f"{found['flops_per_token_causal']:.4g}", _computed(m)),
        ("FLOPs", f"{found['flops']:.4g}", "in full" + (", Muon's included" if o.muon_lr is not None else "")),
        ("memory per worker", f"{found['memory_gb_total']:.2f} GB", f"of {device.memory_gb:g} GB: {_fits(found)}"),
        (
            "  at rest",
            f"{memory['weights_gradients_adam']:.2f} GB",
            f"16 bytes{_muons(o)} x parameters / {w.fsdp_size} workers",
        ),
        ("  gathered", f"{memory['gathered_weights']:.2f} GB", f"{width} bytes x (2 blocks + embeddings, head)"),
        (
            "  activations",
            f"{memory['activations']:.2f} GB",
            f"{found['images_per_pass']} images x {m.n_positions} x ({_blocks(m, w, width)} + {width + 8} d"
            f" + {2 * width + 4} V) bytes",
        ),
        (
            "step",
            f"{found['step_seconds']:.4g} s",
            f"{'4/3 ' if w.activation_checkpointing == 'full' else ''}causal FLOPs"
            f" / ({w.n} x {device.tflops:g} TFLOP/s x {c.mfu:g}),"
            f" {found['passes_per_step']} pass(es)",
        ),
        (
            "traffic",
            f"{found['traffic_seconds']:.4g} s",
            f"{_traffic(w, c, found)} per worker and step,"
            f" {'hidden' if found['traffic_seconds'] <= found['step_seconds'] else 'the LIMIT'}",
        ),
        ("speed", f"{found['tokens_per_second']:,} tokens/s", "over all workers"),
        ("time", f"{found['hours']:,} h", f"{found['device_hours']:,} {c.device} hours"),
    ]
    if c.price is not None:
        rows.append(("money", f"${found['dollars']:,}", f"at ${c.price:g} for an hour of one {c.device}"))
    return [f"{what:18} {much:>20}   {why}" for what, much, why in rows]


def _traffic(workers: WorkersConfig, cluster: ClusterConfig, found: dict[str, Any]) -> str:
    bus, bus_between = buses(workers, cluster)
    said = f"{found['traffic_gb_per_step']:.3g} GB at {bus:g} GB/s"
    if workers.fsdp_size < workers.n:
        said += f" and {found['traffic_gb_between_copies']:.3g} GB at {bus_between:g} GB/s between copies"
    return said


def _muons(optim: OptimConfig) -> str:
    return "" if optim.muon_lr is None else " (12 in the blocks: Muon)"


def _blocks(model: ModelConfig, workers: WorkersConfig, width: int) -> str:
    """What `activation_bytes` takes for the blocks, in its letters."""
    block = block_bytes(model, width)
    if workers.activation_checkpointing == "none":
        return f"{block} L d"
    return f"{width * (PRODUCT_WIDTHS if workers.activation_checkpointing == 'selective' else 1)} L d + {block} d"


def _computed(model: ModelConfig) -> str:
    if model.objective == "masked":
        return "the same: a masked network attends in full"
    return "6 (12 L d^2 + V d) + 6 L n d: what is computed"


def _fits(found: dict[str, Any]) -> str:
    mend = "more workers, a smaller --workers.micro-batch, or --workers.activation-checkpointing selective or full"
    return "fits" if found["fits"] else f"does NOT fit: {mend}"
