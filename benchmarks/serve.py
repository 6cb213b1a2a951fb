"""Completions by the engine, by transformers' `generate` and by a loop without a cache; and the engine under load.

All have the same random weights and the same prompts (upper halves of images), and sample greedily, so that their
tokens can be compared. The floor is the time to read the data that a step needs, weights and the keys and values of the
previous positions, at the memory bandwidth that the same run measures.

Under load, requests arrive at random times regardless of progress (an open loop). With continuous batching, a request
may start at any step. With fixed batches, the same engine admits waiting requests only when it is idle.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from benchmarks.timing import in_turn, timed
from igpt_ray import weights
from igpt_ray.generate.engine import Engine, Generation, Request
from igpt_ray.generate.kv_cache import KVCache
from igpt_ray.generate.quantize import Precision
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.settings import Count, Section

Completer = Callable[[NDArray[np.int64], int], NDArray[np.integer]]
"""Images (B, T) and the number of pixels to generate after the upper half -> those pixels (B, pixels)."""

Times = dict[str, NDArray[np.float64]]
"""Median elapsed and processor seconds (2,) of each completer."""

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
UNCACHED_PIXELS = 2
"""Pixels that the loop without a cache generates. Each of its pixels costs about the same."""


class BenchServeConfig(Section):
    """Compare completions with transformers and with no cache, and continuous with fixed batches under load."""

    n_layer: Count = 24
    """Blocks of the network."""
    n_embd: Count = 512
    """Width of the network."""
    n_head: Count = 8
    """Attention heads of the network."""
    n_px: Count = 32
    """Side of an image in pixels; the upper half is the prompt."""
    pixels: Annotated[int, Field(ge=2)] = 512
    """Pixels of the lower half to generate; fewer than all of them take less time."""
    batches: tuple[Count, ...] = (1, 8, 32)
    """Images per batch."""
    rounds: Count = 1
    """Repetitions; results are medians over them."""
    threads: Count = 2
    """Threads of torch on the CPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to run on."""
    slots: Count = 8
    """Slots of the engine under load."""
    precision: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Precision of the engine under load."""
    requests: Count = 40
    """Requests under load, of one sample each."""
    load: Annotated[float, Field(gt=0)] = 0.6
    """Arrival rate under load, as a share of the engine's throughput with all slots in use."""


def serve(settings: BenchServeConfig) -> dict[str, Any]:
    """Return the cost of each precision, the speed at each batch size, and latencies under load."""
    torch.set_num_threads(settings.threads)
    config = ModelConfig(n_layer=settings.n_layer, n_embd=settings.n_embd, n_head=settings.n_head, n_px=settings.n_px)
    torch.manual_seed(0)
    model = ImageGPT(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.wtet.weight, std=0.05)  # the initial zeros would make all colours equally likely
    model.to(settings.device)
    return {
        "settings": settings.model_dump(),
        "torch": torch.__version__,
        "quality": quality(model),
        "batches": {str(n): compare(model, n, settings) for n in settings.batches},
        "load": under_load(model, settings),
    }


def random_images(model: ImageGPT, n: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    return rng.integers(0, model.config.n_vocab, (n, model.config.n_positions))


# ------------------------------------------------------------------------------------------------ batches


def compare(model: ImageGPT, batch: int, settings: BenchServeConfig) -> dict[str, Any]:
    """Speeds at one batch size; `over_transformers` is the ratio to the faster of transformers' precisions."""
    completers: dict[str, Completer] = {f"ours {precision}": ours(model, batch, precision) for precision in PRECISIONS}
    completers |= {f"transformers {dtype}": transformers(model, dtype) for dtype in ("float32", "bfloat16")}
    if batch == 1:
        completers["without a cache, bfloat16"] = uncached(model)
    first, step, tokens, bandwidth = measure(completers, model, batch, settings)
    total = {name: first[name] + (settings.pixels - 1) * step[name] for name in completers}
    transformers_total = np.min([total[name] for name in total if name.startswith("transformers")], axis=0)
    position = model.config.n_positions // 2 + settings.pixels // 2
    floor = {p: bytes_of_step(model, batch, position, p) / bandwidth for p in PRECISIONS}
    report: dict[str, Any] = {
        clock: {
            "tokens_per_second": {name: round(batch * settings.pixels / s[i], 2) for name, s in total.items()},
            "after_the_first": {name: round(batch / s[i], 2) for name, s in step.items()},
            "seconds_to_the_first": {name: round(s[i], 3) for name, s in first.items()},
            "over_transformers": {
                f"ours {p}": round(transformers_total[i] / total[f"ours {p}"][i], 2) for p in PRECISIONS
            },
        }
        for i, clock in enumerate(("wall", "cpu"))
    }
    expected = tokens["transformers float32"]
    return report | {
        "of_floor": {f"ours {p}": round(floor[p] / step[f"ours {p}"][0], 3) for p in PRECISIONS},
        "read_gb_per_second": round(bandwidth / 1e9, 1),
        "same_tokens_as_transformers_float32": {
            name: round(float((found == expected).mean()), 4)
            for name, found in tokens.items()
            if not name.startswith("without")
        },
    }


def measure(
    completers: dict[str, Completer], model: ImageGPT, batch: int, settings: BenchServeConfig
) -> tuple[Times, Times, dict[str, NDArray[np.integer]], float]:
    """Seconds to the first token, seconds per later token, tokens, and bytes read per second.

    Each round runs a completer for one token and for `settings.pixels`; the difference is the time of later tokens.
    """
    x = random_images(model, batch)
    for complete in completers.values():
        complete(x[:1], 2)  # allocates and compiles
    first: dict[str, list[NDArray[np.float64]]] = {name: [] for name in completers}
    step: dict[str, list[NDArray[np.float64]]] = {name: [] for name in completers}
    tokens, bandwidth = {}, []
    for _ in range(settings.rounds):
        for name, complete in completers.items():
            pixels = UNCACHED_PIXELS if name.startswith("without") else settings.pixels
            one = np.array(timed(partial(complete, x, 1))[0])
            seconds, tokens[name] = timed(partial(complete, x, pixels))
            first[name].append(one)
            step[name].append((np.array(seconds) - one).clip(1e-9) / (pixels - 1))
        bandwidth.append(read_bandwidth(model))
    medians = [{name: np.median(values, axis=0) for name, values in times.items()} for times in (first, step)]
    return medians[0], medians[1], tokens, statistics.median(bandwidth)


def ours(model: ImageGPT, batch: int, precision: Precision) -> Completer:
    engine = Engine(model, batch, precision)

    def complete(x: NDArray[np.int64], pixels: int) -> NDArray[np.integer]:
        half = x.shape[1] // 2
        generations = [engine.submit(request(tokens, half, pixels, temperature=0)) for tokens in x]
        drain(engine)
        return np.concatenate([generation.tokens[:, half : half + pixels] for generation in generations])

    return complete


def drain(engine: Engine) -> None:
    """Step until every submitted request is finished."""
    while engine.slots_in_use or engine.waiting:
        engine.step()


def request(tokens: NDArray[np.int64], half: int, pixels: int, temperature: float = 1, seed: int = 0) -> Request:
    """Request to generate `pixels` pixels after the upper half; later pixels are prompt, so that it ends there."""
    positions = np.arange(len(tokens))
    return Request(tokens, (positions < half) | (positions >= half + pixels), (seed,), temperature)


def transformers(model: ImageGPT, dtype: str) -> Completer:
    from transformers import GenerationConfig, ImageGPTForCausalImageModeling

    with tempfile.TemporaryDirectory() as folder:
        weights.save_hf(model, folder)
        reference = ImageGPTForCausalImageModeling.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    reference.to(model.wpe.device)
    start = model.config.n_vocab

    @torch.inference_mode()
    def complete(x: NDArray[np.int64], pixels: int) -> NDArray[np.integer]:
        half = x.shape[1] // 2
        prompt = torch.from_numpy(np.pad(x[:, :half], ((0, 0), (1, 0)), constant_values=start)).to(model.wpe.device)
        greedy = GenerationConfig(max_new_tokens=pixels, do_sample=False, use_cache=True, pad_token_id=start)
        output = reference.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)
        return output[:, half + 1 :].cpu().numpy()

    return complete


def uncached(model: ImageGPT) -> Completer:
    """One forward pass over all previous pixels per new pixel, as in OpenAI's released sampler."""
    network = ImageGPT(model.config).eval().requires_grad_(False)
    network.load_state_dict(model.state_dict())
    network.to(device=model.wpe.device, dtype=torch.bfloat16)

    @torch.inference_mode()
    def complete(x: NDArray[np.int64], pixels: int) -> NDArray[np.integer]:
        half = x.shape[1] // 2
        tokens = torch.from_numpy(x[:, : half + 1]).to(model.wpe.device)
        for _ in range(pixels):
            tokens[:, -1] = network.wtet(network.hidden(tokens)[:, -1]).argmax(-1)
            tokens = torch.nn.functional.pad(tokens, (0, 1))
        return tokens[:, half:-1].cpu().numpy()

    return complete


def read_bandwidth(model: ImageGPT) -> float:
    """Bytes per second that all threads together read from an array larger than the processor's caches."""
    memory = torch.ones(1 << 28, device=model.wpe.device)
    runs = in_turn({"read": lambda: memory.amax().item()}, rounds=4)
    return memory.numel() * memory.element_size() / min(runs.wall["read"])


def bytes_of_step(model: ImageGPT, batch: int, position: int, precision: Precision) -> int:
    """Bytes that a step reads: all weight matrices once, and the keys and values of every slot."""
    c, width = model.config, 4 if precision == "float32" else 2
    products = 12 * c.n_layer * c.n_embd**2 + c.n_vocab * c.n_embd
    return products * (1 if precision == "int8" else width) + batch * 2 * c.n_layer * position * c.n_embd * width


def quality(model: ImageGPT) -> dict[str, Any]:
    """Loss of quality at lower precision, over two random images.

    `nats_lost` is the mean divergence per pixel from the float32 predictions, and `same_likeliest` the share of pixels
    with the same likeliest colour.
    """
    x = torch.from_numpy(random_images(model, 2)).to(model.wpe.device)
    report = {}
    with torch.inference_mode():
        exact = model(x).double().log_softmax(-1)
        for precision in ("bfloat16", "int8"):
            log_probs = KVCache(model, 1, precision).network(x).double().log_softmax(-1)
            report[precision] = {
                "nats_lost": float((exact.exp() * (exact - log_probs)).sum(-1).mean()),
                "same_likeliest": float((exact.argmax(-1) == log_probs.argmax(-1)).float().mean()),
            }
    return report


# ------------------------------------------------------------------------------------------------ load


def under_load(model: ImageGPT, settings: BenchServeConfig) -> dict[str, Any]:
    """Throughput and latencies of continuous and of fixed batches, for the same requests at the same times."""
    engine = Engine(model, settings.slots, settings.precision)
    x, half = random_images(model, settings.requests), model.config.n_positions // 2
    requests = [request(tokens, half, settings.pixels, seed=i) for i, tokens in enumerate(x)]
    for first in requests[: settings.slots]:
        engine.submit(first)
    seconds = timed(lambda: drain(engine))[0].wall
    rate = settings.load * min(settings.slots, len(requests)) / seconds
    arrivals = np.random.default_rng(1).exponential(1 / rate, len(requests)).cumsum()
    continuous, a = serve_arrivals(engine, requests, arrivals, continuous=True)
    fixed, b = serve_arrivals(engine, requests, arrivals, continuous=False)
    return {
        "requests_per_second": round(rate, 3),
        "continuous": continuous,
        "fixed": fixed,
        "first_row_p99_of_fixed": round(continuous["first_row_p99"] / fixed["first_row_p99"], 3),
        "same_tokens": all((one.tokens == other.tokens).all() for one, other in zip(a, b, strict=True)),
    }


def serve_arrivals(
    engine: Engine, requests: list[Request], arrivals: NDArray[np.float64], continuous: bool
) -> tuple[dict[str, float], list[Generation]]:
    """Submit each request at its arrival time.

    Returns throughput, percentiles of the seconds from arrival to the first row and to the end, and the generations.
    """
    n, n_px = len(requests), int(len(requests[0].tokens) ** 0.5)
    generations: list[Generation] = []
    row, end = np.full(n, np.nan), np.full(n, np.nan)
    starts = [int(np.flatnonzero(~request.prompt_mask)[0]) for request in requests]
    pixels = sum(int((~request.prompt_mask).sum()) for request in requests)
    started = time.perf_counter()
    while np.isnan(end).any():
        now = time.perf_counter() - started
        idle = not (engine.slots_in_use or engine.waiting)
        arrived, submitted = int((arrivals <= now).sum()), len(generations)
        if continuous or idle:
            limit = n if continuous else submitted + engine.slots
            generations += [engine.submit(request) for request in requests[submitted : min(arrived, limit)]]
        if idle and len(generations) == arrived < n and not engine.waiting:
            time.sleep(max(0.0, arrivals[arrived] - now))
            continue
        engine.step()
        now = time.perf_counter() - started
        for i, generation in enumerate(generations):
            if np.isnan(row[i]) and (generation.position >= starts[i] + n_px or generation.finished):
                row[i] = now - arrivals[i]
            if np.isnan(end[i]) and generation.finished:
                end[i] = now - arrivals[i]
    return {
        "tokens_per_second": round(pixels / (time.perf_counter() - started), 1),
        **{f"first_row_p{p}": round(float(np.percentile(row, p)), 3) for p in (50, 99)},
        **{f"end_p{p}": round(float(np.percentile(end, p)), 3) for p in (50, 99)},
    }, generations
