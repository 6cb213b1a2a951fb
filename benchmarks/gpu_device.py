"""Parts `where`, `attention` and `palette` of `benchmarks/gpu.py`: the device itself."""

import platform
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import Part
from benchmarks.timing import timed
from igpt_ray.train.presets import PRESETS

SIZES = ("igpt-s", "igpt-m", "igpt-l")
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def device_of(part: Part) -> torch.device:
    """The GPU, or the CPU at toy size. Raises `RuntimeError` if there is no GPU."""
    if part.toy and not torch.cuda.is_available():
        torch.set_num_threads(1)  # more threads only wait for each other at toy size
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU: --toy runs at toy size on a CPU")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median seconds of a call by CUDA events, after three calls to warm up."""
    if device.type == "cpu":
        return timed(work)[0].wall  # only at toy size
    for _ in range(3):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def where_part(part: Part) -> None:
    """Versions, and the two ceilings: GB/s of a copy, TFLOP/s of bfloat16 products."""
    device = device_of(part)
    cuda = device.type == "cuda"
    driver = _stdout(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
    part.add("python", platform.python_version())
    part.add("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    part.add("device", driver if cuda else platform.processor() or platform.machine())
    part.add("commit", _stdout(["git", "rev-parse", "HEAD"]))
    part.measure("copy_gb_per_s", lambda: round(copy_rate(device, part.toy) / 1e9, 1))
    part.measure("product_tflops", lambda: products(device, part.toy))


def copy_rate(device: torch.device, toy: bool) -> float:
    """Bytes read and written per second by a copy on the device."""
    n = 2**20 if toy else 2**32
    source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n / seconds(lambda: target.copy_(source), device)


def products(device: torch.device, toy: bool) -> dict[str, float]:
    """TFLOP/s of bfloat16 products: a large square, and the MLP's first at 32 images of S, M and L."""
    shapes = {"square": (256, 256, 256) if toy else (8192, 8192, 8192)}
    for name in SIZES:
        width = 64 if toy else PRESETS[name][1].model.n_embd
        shapes[name] = (256 if toy else 32 * 1024, width, 4 * width)
    rates = {}
    for name, (m, k, n) in shapes.items():
        x, w = (torch.randn(*shape, device=device, dtype=torch.bfloat16) for shape in ((m, k), (n, k)))
        rates[name] = round(2 * m * k * n / seconds(lambda x=x, w=w: F.linear(x, w), device) / 1e12, 3)  # type: ignore[misc]
    return rates


def attention_part(part: Part) -> None:
    """TFLOP/s of causal attention by backend, and microseconds of attention of one query over all positions."""
    device = device_of(part)
    backends = BACKENDS if device.type == "cuda" else {"math": SDPBackend.MATH}
    T = 64 if part.toy else 1024
    for size in SIZES[: 1 if part.toy else None]:
        config = PRESETS[size][1].model
        N, D = config.n_head, config.head_width
        B = 2 if part.toy else 32
        q, k, v = (
            torch.randn(B, T, N, D, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for _ in range(3)
        )
        flops = 2 * B * N * T * T * D  # causal: half of the two products
        for name, backend in {"default": None, **backends}.items():
            part.measure(f"{size} {name}", lambda b=backend, x=(q, k, v), f=flops: causal(x, b, f, device))
        part.measure(f"{size} one query", lambda c=config: one_query(c.n_head, c.head_width, T, device))
    part.measure("float32 errors", lambda: float32_errors(device))


def causal(
    qkv: tuple[Tensor, Tensor, Tensor], backend: SDPBackend | None, flops: int, device: torch.device
) -> dict[str, float]:
    """TFLOP/s of the forward and of the backward pass, which has 2.5 times its FLOPs."""
    q, k, v = qkv

    def forward() -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    y = forward()
    dy = torch.randn_like(y)
    one = seconds(forward, device)
    both = seconds(lambda: torch.autograd.grad(forward(), (q, k, v), dy), device)
    return {"forward": round(flops / one / 1e12, 1), "backward": round(2.5 * flops / (both - one) / 1e12, 1)}


def float32_errors(device: torch.device) -> dict[str, float]:
    """Largest error of float32 attention, against float64, by head width; of 16 positions, and normal inputs."""
    errors = {}
    for width in (8, 16, 32, 64, 96, 128):
        q, k, v = (torch.randn(3, 4, 16, width, device=device) for _ in range(3))
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        errors[str(width)] = float(f"{float((y - exact).abs().max()):.1e}")
    return errors


def one_query(n_head: int, width: int, n: int, device: torch.device) -> dict[str, float]:
    """Microseconds of one layer for 1 and 32 slots, with a boolean mask, an additive bias, and no mask."""
    out = {}
    for slots in (1, 32):
        q = torch.randn(slots, n_head, 1, width, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(slots, n_head, n, width, device=device, dtype=torch.bfloat16) for _ in range(2))
        reached = torch.ones(slots, 1, 1, n, dtype=torch.bool, device=device)
        bias = torch.zeros(slots, 1, 1, n, dtype=torch.bfloat16, device=device)
        for name, mask in (("mask", reached), ("bias", bias), ("none", None)):
            work = lambda q=q, k=k, v=v, m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m)  # noqa: E731
            out[f"{slots} {name}"] = round(1e6 * seconds(work, device), 1)
    return out


def palette_part(part: Part) -> None:
    """Seconds and squared error of k-means with 884,000 random colours and 512 centres, on the CPU and on the GPU."""
    import faiss

    from igpt_ray.data import kmeans

    n, k = (2_000, 16) if part.toy else (884_000, 512)
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, 255, (40, 3))
    pixels = np.clip(centres[rng.integers(0, 40, 4 * n)] + rng.normal(0, 25, (4 * n, 3)), 0, 255).astype(np.uint8)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    points = kmeans.Points((colours[:n] / 127.5 - 1).astype(np.float32), counts[:n].astype(np.float64))
    gpus = int(faiss.get_num_gpus())
    part.add("faiss", {"version": faiss.__version__, "gpus": gpus, "colours": len(points.xyz)})
    for name, gpu in (("cpu", False), *((("gpu", True),) if gpus else ())):
        part.measure(name, lambda gpu=gpu: cluster(points, k, gpu))


def cluster(points: Any, k: int, gpu: bool) -> dict[str, float]:
    from igpt_ray.data import kmeans

    taken, centres = timed(lambda: kmeans.fit(points, k, gpu=gpu))
    values, weights = (torch.from_numpy(np.asarray(x)) for x in points)
    nearest = torch.cat([torch.cdist(part, torch.from_numpy(centres)).amin(1) for part in values.split(65536)])
    return {"seconds": round(taken.wall, 2), "mse": float((nearest.square() * weights).sum() / weights.sum())}


def _stdout(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except FileNotFoundError:
        return "unknown"
