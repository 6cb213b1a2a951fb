"""How fast, how good, and beside what.

    python jobs/bench.py palette --images FOLDER

Alternatives take turns in one process, each on one thread; the figures are medians over the rounds. No Ray.
"""

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import tyro
from numpy.typing import NDArray
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from igpt_ray import images, sources
from igpt_ray.config import BenchPalette
from igpt_ray.palette import COLOURS, Palette, pack, scale

FLAT = (tyro.conf.OmitArgPrefixes,)  # --images, not --settings.images
Report = dict[str, Any]
Pixels = NDArray[np.uint8]


def palette(settings: BenchPalette) -> Report:
    """Fit palettes to the same pixels in several ways, and judge them on held-out images; then look colours up."""
    faiss.omp_set_num_threads(1)
    fit, held_out = read_pixels(settings)
    runs: dict[str, list[tuple[float, float, Palette]]] = {}
    with threadpool_limits(1):
        for seed in range(settings.rounds):
            for name, way in WAYS.items():
                runs.setdefault(name, []).append(timed(functools.partial(way, fit, settings.k, seed)))
    ways = {name: judged(found, fit, held_out) for name, found in runs.items()}
    return {"pixels": len(fit), "held_out": len(held_out), "k": settings.k, "ways": ways, **encoding(fit, settings)}


def ours(pixels: Pixels, k: int, seed: int) -> Palette:
    return Palette.fit(np.bincount(pack(pixels), minlength=COLOURS), k, seed)


def faiss_defaults(pixels: Pixels, k: int, seed: int) -> Palette:
    kmeans = faiss.Kmeans(3, k, seed=seed + 1)
    kmeans.train(scale(pixels))
    return Palette(np.asarray(kmeans.centroids, np.float32))


def sklearn_lloyd_25(pixels: Pixels, k: int, seed: int) -> Palette:
    """tol=0, or it would stop before the 25 iterations are over."""
    kmeans = KMeans(k, n_init=1, max_iter=25, tol=0, algorithm="lloyd", random_state=seed)
    return Palette(kmeans.fit(scale(pixels)).cluster_centers_.astype(np.float32))


def sklearn_minibatch(pixels: Pixels, k: int, seed: int) -> Palette:
    kmeans = MiniBatchKMeans(k, n_init=1, random_state=seed)
    return Palette(kmeans.fit(scale(pixels)).cluster_centers_.astype(np.float32))


WAYS: dict[str, Callable[[Pixels, int, int], Palette]] = {
    way.__name__: way for way in (ours, faiss_defaults, sklearn_lloyd_25, sklearn_minibatch)
}


def read_pixels(settings: BenchPalette) -> tuple[Pixels, Pixels]:
    """A random choice of the centre views' pixels, and all pixels of every fifth image, which is held out."""
    units = sources.plan(settings.images, 1000).units
    found = [image.data for unit in units for image in sources.read(unit)]
    views = np.stack([images.centre_view(images.decode(data), settings.n_px) for data in found])
    held_out = np.arange(len(views)) % 5 == 4
    pixels = views[~held_out].reshape(-1, 3)
    chosen = np.random.default_rng(0).permutation(len(pixels))[: settings.pixels]
    return pixels[chosen], views[held_out].reshape(-1, 3)


def timed(work: Callable[[], Palette]) -> tuple[float, float, Palette]:
    """Seconds by the wall, seconds of the processor (which neighbours on the machine disturb less), the result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - processor, result


def judged(runs: list[tuple[float, float, Palette]], fit: Pixels, held_out: Pixels) -> Report:
    wall, processor, palettes = zip(*runs, strict=True)
    return {
        "seconds": round(float(np.median(wall)), 2),
        "cpu_seconds": round(float(np.median(processor)), 2),
        "mse": round(float(np.median([mse(p, fit) for p in palettes])), 2),
        "held_out_mse": round(float(np.median([mse(p, held_out) for p in palettes])), 2),
        "held_out_range": [round(f([mse(p, held_out) for p in palettes]), 2) for f in (min, max)],
    }


def mse(palette: Palette, pixels: Pixels) -> float:
    """Mean squared distance of a pixel to the nearest colour, in 8-bit units, summed over the channels."""
    index = faiss.IndexFlatL2(3)
    index.add(np.ascontiguousarray(palette.colours))
    nearest = index.search(scale(pixels), 1)[1][:, 0]
    away = (scale(pixels).astype(np.float64) - palette.colours[nearest]) * 127.5
    return float((away**2).sum(1).mean())


def encoding(pixels: Pixels, settings: BenchPalette) -> Report:
    """Millions of pixels a second on one core, beside a bare gather from the same table with ready-made indices."""
    openai = Palette.load("openai")
    many = np.resize(pixels, (settings.encode_pixels, 3))
    tokens, table = openai.encode(many), openai._table
    order = pack(many[:, ::-1]).astype(np.intp)
    ways = {
        "encode_mpx_per_s": lambda: openai.encode(many),
        "gather_mpx_per_s": lambda: np.take(table, order, out=tokens, mode="clip"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: round(len(many) / 1e6 / float(np.median(s)), 1) for name, s in seconds.items()}


if __name__ == "__main__":
    print(json.dumps(tyro.extras.subcommand_cli_from_dict({"palette": palette}, config=FLAT)))
