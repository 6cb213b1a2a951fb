"""Ways to fit a palette, judged on held-out images; and how fast colours are looked up.

Alternatives take turns in one process, each on one thread; the figures are medians over the rounds. No Ray. Seconds are
by the wall, and of the processor, which neighbours on the machine disturb less.
"""

import time
from collections.abc import Callable
from typing import Annotated, Any

import faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from igpt_ray.data import pixels as images
from igpt_ray.data import sources
from igpt_ray.data.palette import COLOURS, Palette, pack, scale
from igpt_ray.settings import Count, Section, Uri

Report = dict[str, Any]
Pixels = NDArray[np.uint8]


class BenchPaletteConfig(Section):
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


def palette(settings: BenchPaletteConfig) -> Report:
    """Fit palettes to the same pixels in several ways, and judge them on held-out images; then look colours up.

    Each round holds out another fifth of the images: with few images, which ones matters more than the way.
    """
    faiss.omp_set_num_threads(1)
    views = read_views(settings)
    found: list[Report] = []
    with threadpool_limits(1):
        for seed in range(settings.rounds):
            fit, held_out = divided(views, settings.pixels, seed)
            found.append({name: judged(way, fit, held_out, settings.k, seed) for name, way in WAYS.items()})
    ways = {name: medians([ways[name] for ways in found]) for name in WAYS}
    against = [ways["ours"]["held_out_mse"] / ways["sklearn_lloyd_25"]["held_out_mse"] for ways in found]
    return {
        "pixels": len(fit),
        "rounds": settings.rounds,
        "ways": ways,
        "held_out_mse_of_sklearns": [round(ratio, 4) for ratio in against],
        **encoding(fit, settings.encode_pixels),
    }


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


def read_views(settings: BenchPaletteConfig) -> NDArray[np.uint8]:
    units = sources.plan(settings.images, 1000).units
    found = [image for unit in units for image in sources.read(unit) if isinstance(image, sources.Image)]
    return np.stack([images.centre_view(image.data, settings.n_px) for image in found])


def divided(views: NDArray[np.uint8], n: int, seed: int) -> tuple[Pixels, Pixels]:
    """n pixels to fit to, drawn from four fifths of the images, and all pixels of the last fifth."""
    held_out = np.arange(len(views)) % 5 == seed % 5
    pixels = views[~held_out].reshape(-1, 3)
    return pixels[np.random.default_rng(seed).permutation(len(pixels))[:n]], views[held_out].reshape(-1, 3)


def judged(way: Callable[[Pixels, int, int], Palette], fit: Pixels, held_out: Pixels, k: int, seed: int) -> Report:
    wall, processor, fitted = timed(lambda: way(fit, k, seed))
    return {"seconds": wall, "cpu_seconds": processor, "mse": mse(fitted, fit), "held_out_mse": mse(fitted, held_out)}


def medians(rounds: list[Report]) -> Report:
    return {name: round(float(np.median([found[name] for found in rounds])), 2) for name in rounds[0]}


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds by the wall, seconds of the processor, the result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - processor, result


def mse(palette: Palette, pixels: Pixels) -> float:
    """Mean squared distance of a pixel to the nearest colour, in 8-bit units, summed over the channels."""
    index = faiss.IndexFlatL2(3)
    index.add(np.ascontiguousarray(palette.colours))
    nearest = index.search(scale(pixels), 1)[1][:, 0]
    away = (scale(pixels).astype(np.float64) - palette.colours[nearest]) * 127.5
    return float((away**2).sum(1).mean())


def encoding(pixels: Pixels, n: int) -> Report:
    """Millions of pixels a second on one core, beside a bare gather from the same table with ready-made indices."""
    openai = Palette.load("openai")
    many = np.resize(pixels, (n, 3))
    tokens, table = openai.encode(many), openai._table
    order = pack(many[:, ::-1]).astype(np.intp)
    ways: dict[str, Callable[[], Any]] = {
        "encode": lambda: openai.encode(many),
        "gather": lambda: np.take(table, order, out=tokens, mode="clip"),
    }
    runs = [{name: timed(way) for name, way in ways.items()} for _ in range(9)]
    rate = {
        f"{name}_mpx_per_{unit}": n / 1e6 / float(np.median([run[name][clock] for run in runs]))
        for name in ways
        for clock, unit in enumerate(("second", "cpu_second"))
    }
    return {name: round(value, 1) for name, value in rate.items()}
