"""Pictures finished by the engine beside transformers' `generate` and a loop without a cache; the engine under load.

All have the same random weights, are given the same upper halves, draw the likeliest colours, so that tokens can be
compared, and take turns in every round. The floor is the time to read what a step cannot do without, weights and the
keys and values of the positions so far, at the bandwidth that the same run measures.

Under load, requests come at random times whoever is being served (an open loop). Continuous batching lets them in
between two positions; fixed batches are the same engine, which takes in who waits once it has finished all it had.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from igpt_ray import weights
from igpt_ray.generate.engine import Engine, Generation, Request
from igpt_ray.generate.kv_cache import KVCache
from igpt_ray.generate.quantize import Precision
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.settings import Count, Section

Way = Callable[[NDArray[np.int64], int], NDArray[np.integer]]
"""Pictures (B, T), and how many pixels to draw behind the upper half -> those pixels, (B, pixels)."""

Taken = NDArray[np.float64]
"""Seconds on the wall's clock and on the processor's."""

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
UNCACHED_PIXELS = 2
"""That the loop without a cache draws: all are alike."""


class BenchServeConfig(Section):
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
    slots: Count = 8
    """Of the engine under load."""
    precision: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Of the engine under load."""
    requests: Count = 40
    """That come under load, of one sample each."""
    load: Annotated[float, Field(gt=0)] = 0.6
    """How fast they come, as a share of what the engine finishes with all slots in use."""


def serve(settings: BenchServeConfig) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    shape = ModelConfig(n_layer=settings.n_layer, n_embd=settings.n_embd, n_head=settings.n_head, n_px=settings.n_px)
    torch.manual_seed(0)
    model = ImageGPT(shape).eval().requires_grad_(False)
    torch.nn.init.normal_(model.wtet.weight, std=0.05)  # or all colours would be equally likely
    model.to(settings.device)
    return {
        "settings": settings.model_dump(),
        "torch": torch.__version__,
        "quality": quality(model),
        "batches": {str(n): compared(model, n, settings) for n in settings.batches},
        "load": under_load(model, settings),
    }


def pictures(model: ImageGPT, n: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    return rng.integers(0, model.config.n_vocab, (n, model.config.n_positions))


# ------------------------------------------------------------------------------------------------ batches


def compared(model: ImageGPT, batch: int, settings: BenchServeConfig) -> dict[str, Any]:
    ways: dict[str, Way] = {f"ours {precision}": ours(model, batch, precision) for precision in PRECISIONS}
    ways |= {f"transformers {dtype}": transformers(model, dtype) for dtype in ("float32", "bfloat16")}
    if batch == 1:
        ways["without a cache, bfloat16"] = uncached(model)
    x = pictures(model, batch)
    found = {}
    first, rest = ({name: list[Taken]() for name in ways} for _ in range(2))
    bandwidth = []
    for way in ways.values():
        way(x[:1], 2)  # once before the clock: whatever is made on the first call
    for _ in range(settings.rounds):
        for name, way in ways.items():
            pixels = UNCACHED_PIXELS if name.startswith("without") else settings.pixels
            _, once = timed(way, x, 1)
            found[name], taken = timed(way, x, pixels)
            first[name].append(once)
            rest[name].append((taken - once).clip(1e-9) / (pixels - 1))
        bandwidth.append(read_bandwidth(model))
    begin = {name: np.median(taken, axis=0) for name, taken in first.items()}
    step = {name: np.median(taken, axis=0) for name, taken in rest.items()}
    whole = {name: begin[name] + (settings.pixels - 1) * step[name] for name in ways}
    theirs = np.min([taken for name, taken in whole.items() if name.startswith("transformers")], axis=0)
    position = model.config.n_positions // 2 + settings.pixels // 2
    floor = {p: bytes_of_step(model, batch, position, p) / statistics.median(bandwidth) for p in PRECISIONS}
    report: dict[str, Any] = {
        clock: {
            "tokens_per_second": {name: round(batch * settings.pixels / taken[i], 2) for name, taken in whole.items()},
            "after_the_first": {name: round(batch / taken[i], 2) for name, taken in step.items()},
            "seconds_to_the_first": {name: round(taken[i], 3) for name, taken in begin.items()},
            "over_transformers": {f"ours {p}": round(theirs[i] / whole[f"ours {p}"][i], 2) for p in PRECISIONS},
        }
        for i, clock in enumerate(("wall", "cpu"))
    }
    return report | {
        "of_floor": {f"ours {p}": round(floor[p] / step[f"ours {p}"][0], 3) for p in PRECISIONS},
        "read_gb_per_second": round(statistics.median(bandwidth) / 1e9, 1),
        "same_tokens_as_transformers_float32": {
            name: round(float((tokens == found["transformers float32"]).mean()), 4)
            for name, tokens in found.items()
            if not name.startswith("without")
        },
    }


def timed(way: Way, x: NDArray[np.int64], pixels: int) -> tuple[NDArray[np.integer], Taken]:
    """With others at work on the machine the processor's clock is the fairer one, of one thread: two spin."""
    started, cpu_started = time.perf_counter(), time.process_time()
    found = way(x, pixels)
    return found, np.array([time.perf_counter() - started, time.process_time() - cpu_started])


def ours(model: ImageGPT, batch: int, precision: Precision) -> Way:
    engine = Engine(model, batch, precision)

    def way(x: NDArray[np.int64], pixels: int) -> NDArray[np.integer]:
        half = x.shape[1] // 2
        tickets = [engine.submit(request(tokens, half, pixels, temperature=0)) for tokens in x]
        while engine.slots_in_use or engine.waiting:
            engine.step()
        return np.concatenate([ticket.tokens[:, half : half + pixels] for ticket in tickets])

    return way


def request(tokens: NDArray[np.int64], half: int, pixels: int, temperature: float = 1, seed: int = 0) -> Request:
    """To draw so many pixels behind the upper half. Those behind them are given, so that the request ends there."""
    at = np.arange(len(tokens))
    return Request(tokens, (at < half) | (at >= half + pixels), (seed,), temperature)


def transformers(model: ImageGPT, dtype: str) -> Way:
    from transformers import GenerationConfig, ImageGPTForCausalImageModeling

    with tempfile.TemporaryDirectory() as folder:
        weights.save_hf(model, folder)
        theirs = ImageGPTForCausalImageModeling.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    theirs.to(model.wpe.device)
    start = model.config.n_vocab

    @torch.inference_mode()
    def way(x: NDArray[np.int64], pixels: int) -> NDArray[np.integer]:
        half = x.shape[1] // 2
        given = torch.from_numpy(np.pad(x[:, :half], ((0, 0), (1, 0)), constant_values=start)).to(model.wpe.device)
        greedy = GenerationConfig(max_new_tokens=pixels, do_sample=False, use_cache=True, pad_token_id=start)
        done = theirs.generate(given, attention_mask=torch.ones_like(given), generation_config=greedy)
        return done[:, half + 1 :].cpu().numpy()

    return way


def uncached(model: ImageGPT) -> Way:
    """Every pixel a pass over all before it, as OpenAI's released sampler does."""
    network = ImageGPT(model.config).eval().requires_grad_(False)
    network.load_state_dict(model.state_dict())
    network.to(device=model.wpe.device, dtype=torch.bfloat16)

    @torch.inference_mode()
    def way(x: NDArray[np.int64], pixels: int) -> NDArray[np.integer]:
        half = x.shape[1] // 2
        tokens = torch.from_numpy(x[:, : half + 1]).to(model.wpe.device)
        for _ in range(pixels):
            tokens[:, -1] = network.wtet(network.hidden(tokens)[:, -1]).argmax(-1)
            tokens = torch.nn.functional.pad(tokens, (0, 1))
        return tokens[:, half:-1].cpu().numpy()

    return way


def read_bandwidth(model: ImageGPT) -> float:
    """Bytes a second that all threads together read of memory that no cache holds."""
    memory = torch.ones(1 << 28, device=model.wpe.device)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        memory.amax().item()
        seconds.append(time.perf_counter() - started)
    return memory.numel() * memory.element_size() / min(seconds)


def bytes_of_step(model: ImageGPT, batch: int, position: int, precision: Precision) -> int:
    """Weights of all products once, and the keys and values of every slot."""
    c, wide = model.config, 4 if precision == "float32" else 2
    products = 12 * c.n_layer * c.n_embd**2 + c.n_vocab * c.n_embd
    return products * (1 if precision == "int8" else wide) + batch * 2 * c.n_layer * position * c.n_embd * wide


def quality(model: ImageGPT) -> dict[str, Any]:
    """What fewer bits do to predictions: nats lost a pixel (the mean divergence from the float32 network), how often
    the likeliest colour is the same; over two random pictures."""
    x = torch.from_numpy(pictures(model, 2)).to(model.wpe.device)
    with torch.inference_mode():
        exact = model(x).double().log_softmax(-1)
        found = {p: KVCache(model, 1, p).network(x).double().log_softmax(-1) for p in ("bfloat16", "int8")}
    return {
        p: {
            "nats_lost": _nats_lost(exact, lp),
            "same_likeliest": float((exact.argmax(-1) == lp.argmax(-1)).float().mean()),
        }
        for p, lp in found.items()
    }


def _nats_lost(exact: Tensor, other: Tensor) -> float:
    return float((exact.exp() * (exact - other)).sum(-1).mean())


# ------------------------------------------------------------------------------------------------ load


def under_load(model: ImageGPT, settings: BenchServeConfig) -> dict[str, Any]:
    """The rate is a share of what the engine does with all slots in use, measured first."""
    engine = Engine(model, settings.slots, settings.precision)
    x, half = pictures(model, settings.requests), model.config.n_positions // 2
    asked = [request(tokens, half, settings.pixels, seed=i) for i, tokens in enumerate(x)]
    started = time.perf_counter()
    for one in asked[: settings.slots]:
        engine.submit(one)
    while engine.slots_in_use or engine.waiting:
        engine.step()
    rate = settings.load * min(settings.slots, len(asked)) / (time.perf_counter() - started)  # requests a second
    arrivals = np.random.default_rng(1).exponential(1 / rate, len(asked)).cumsum()
    continuous, a = attended_to(engine, asked, arrivals, continuous=True)
    fixed, b = attended_to(engine, asked, arrivals, continuous=False)
    return {
        "requests_per_second": round(rate, 3),
        "continuous": continuous,
        "fixed": fixed,
        "first_row_p99_of_fixed": round(continuous["first_row_p99"] / fixed["first_row_p99"], 3),
        "same_tokens": all((one.tokens == other.tokens).all() for one, other in zip(a, b, strict=True)),
    }


def attended_to(
    engine: Engine, asked: list[Request], arrivals: NDArray[np.float64], continuous: bool
) -> tuple[dict[str, float], list[Generation]]:
    """Seconds from the arrival of each request to its first row and to its end."""
    n_px = int(len(asked[0].tokens) ** 0.5)
    tickets: list[Generation] = []
    row, end = np.full(len(asked), np.nan), np.full(len(asked), np.nan)
    begun = [int(np.flatnonzero(~one.prompt_mask)[0]) for one in asked]
    pixels = sum(int((~one.prompt_mask).sum()) for one in asked)
    started = time.perf_counter()
    while np.isnan(end).any():
        now = time.perf_counter() - started
        idle = not (engine.slots_in_use or engine.waiting)
        arrived = int((arrivals <= now).sum())
        if continuous or idle:
            room = len(asked) if continuous else engine.slots
            tickets += [engine.submit(one) for one in asked[len(tickets) : min(arrived, len(tickets) + room)]]
        if idle and len(tickets) == arrived < len(asked) and not engine.waiting:
            time.sleep(max(0.0, arrivals[arrived] - now))
            continue
        engine.step()
        now = time.perf_counter() - started
        for i, ticket in enumerate(tickets):
            if np.isnan(row[i]) and (ticket.position >= begun[i] + n_px or ticket.finished):
                row[i] = now - arrivals[i]
            if np.isnan(end[i]) and ticket.finished:
                end[i] = now - arrivals[i]
    return {
        "tokens_per_second": round(pixels / (time.perf_counter() - started), 1),
        **{f"first_row_p{p}": round(float(np.percentile(row, p)), 3) for p in (50, 99)},
        **{f"end_p{p}": round(float(np.percentile(end, p)), 3) for p in (50, 99)},
    }, tickets
