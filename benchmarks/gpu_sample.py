"""Part `sample` of `benchmarks/gpu.py`: the speed of the engine, against the floor of memory traffic and transformers.

The floor is the time to read the weights once, and the keys and values that the slots have reached, at the speed of a
copy on the device. Every slot completes the lower half of an image.
"""

import json
import time
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import Part
from benchmarks.gpu_device import device_of
from igpt_ray.generate.engine import Engine, Request
from igpt_ray.generate.quantize import Precision
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train.presets import PRESETS

MEASURED: tuple[tuple[str, int, Precision], ...] = (
    ("igpt-s", 1, "bfloat16"),
    ("igpt-s", 32, "bfloat16"),
    ("igpt-s", 128, "bfloat16"),
    ("igpt-s", 32, "float32"),
    ("igpt-s-modern", 32, "bfloat16"),
    ("igpt-l", 1, "bfloat16"),
    ("igpt-l", 32, "bfloat16"),
    ("igpt-s", 1, "float32"),
    ("igpt-s", 1, "int8"),
    ("igpt-s", 32, "int8"),
)


def sample_part(part: Part) -> None:
    """Microseconds per pixel and slot, pixels/s and share of the floor, by network, slots and precision."""
    device = device_of(part)
    ceilings = part.out / "where.json"
    if ceilings.exists():
        part.report["copy_gb_per_s"] = json.loads(ceilings.read_text())["copy_gb_per_s"]
    networks: dict[str, ImageGPT] = {}
    for size, slots, precision in MEASURED:
        name = f"{size} {slots} {precision}"
        if part.wants(name):
            if size not in networks:
                networks = {size: random_network(size, device, part.toy)}
            part.measure(name, lambda s=slots, p=precision, n=networks[size]: speed(n, s, p, part))
        if name == "igpt-s 128 bfloat16":
            for batch in (1, 32):
                part.measure(f"transformers igpt-s {batch}", lambda b=batch: transformers_speed(b, device, part.toy))


def random_network(size: str, device: torch.device, toy: bool) -> ImageGPT:
    config = PRESETS[size][1].model
    if toy:
        config = config.model_copy(update={"n_layer": 2, "n_embd": 32, "n_head": 2, "n_px": 8, "n_vocab": 16})
    torch.manual_seed(0)
    model = ImageGPT(config)
    torch.nn.init.normal_(model.wtet.weight, std=0.05)
    return model.to(device).eval().requires_grad_(False)


def speed(model: ImageGPT, slots: int, precision: Precision, part: Part) -> dict[str, Any]:
    """Two rounds of the lower halves of `slots` images; the second is measured."""
    cuda = model.wpe.device.type == "cuda"
    T, n_px = model.config.n_positions, model.config.n_px
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    engine = Engine(model, slots, precision)
    built = time.perf_counter() - started
    mask = np.arange(T) < T // 2
    tokens = np.random.default_rng(0).integers(0, model.config.n_vocab, T).astype(np.uint16)
    seconds: list[float] = []
    steps: list[float] = []
    for round_ in range(3):
        for slot in range(slots):
            engine.submit(Request(tokens, mask, (1000 * round_ + slot,)))
        began, steps, generated = time.perf_counter(), [], engine.generated
        while engine.waiting or engine.slots_in_use:
            before = time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - before)
        seconds.append(time.perf_counter() - began)
        assert engine.generated - generated == slots * (T // 2)
        if part.seconds_left < 0:
            break
    pixels = T // 2
    per_position = min(seconds) / pixels
    report: dict[str, Any] = {
        "us_per_position": round(1e6 * per_position, 1),
        "pixels_per_s": round(slots / per_position),
        "first_step_ms": round(1e3 * steps[0], 1),  # admission and prefill included
        "last_steps_ms": round(1e3 * sorted(steps)[len(steps) // 2], 3),
        "rows": n_px,
        "seconds_to_build": round(built, 1),
        "seconds_of_first_round": round(seconds[0], 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
    }
    if "copy_gb_per_s" in part.report:
        floor = floor_bytes(model, slots, precision) / part.report["copy_gb_per_s"] / 1e9
        report |= {"floor_us": round(1e6 * floor, 1), "of_floor": round(floor / per_position, 3)}
    return report


def floor_bytes(model: ImageGPT, slots: int, precision: Precision) -> float:
    """Bytes read per position: weights once, and the keys and values of 3/4 of the positions per slot."""
    c = model.config
    width = 4 if precision == "float32" else 2
    weights = c.n_layer * 12 * c.n_embd**2 + c.n_vocab * c.n_embd
    keys_and_values = 2 * c.n_layer * c.n_embd * 0.75 * c.n_positions
    return weights * (1 if precision == "int8" else width) + slots * keys_and_values * width


def transformers_speed(batch: int, device: torch.device, toy: bool) -> dict[str, Any]:
    """`generate` of transformers' ImageGPT in bfloat16 with its cache: 64 tokens after half an image."""
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    width, n_layer, n_head = (32, 2, 2) if toy else (512, 24, 8)
    n_new, T = (4, 64) if toy else (64, 1024)
    config = ImageGPTConfig(vocab_size=513, n_positions=T, n_embd=width, n_layer=n_layer, n_head=n_head)
    network: Any = ImageGPTForCausalImageModeling(config)
    network = network.to(device, torch.bfloat16).eval()
    prompt = torch.randint(0, 512, (batch, T // 2), device=device)
    seconds = []
    with torch.inference_mode():
        for _ in range(2):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            out = network.generate(prompt, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=True, temperature=1.0)
            out.sum().item()
            seconds.append(time.perf_counter() - started)
    per_position = min(seconds) / n_new
    return {"us_per_position": round(1e6 * per_position, 1), "pixels_per_s": round(batch / per_position)}
