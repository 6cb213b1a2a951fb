"""Palette fits compared on held-out images, and the speed of colour look-up.

Every alternative runs on one thread; results are medians over the rounds.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from benchmarks.timing import in_turn
from igpt_ray.data import pixels as images
from igpt_ray.data import sources
from igpt_ray.data.palette import COLOURS, Palette, pack, scale
from igpt_ray.settings import Count, Section, Uri

Report = dict[str, Any]
Pixels = NDArray[np.uint8]


class BenchPaletteConfig(Section):
    """Compare palette fits, and time the look-up of colours."""

    images: Uri
    """URI of images. A fifth of them is held out, a different one in each round."""
    n_px: Annotated[int, Field(gt=0, le=224)] = 128
    """Side in pixels; larger than in training, so that few images have many pixels."""
    pixels: Count = 1_000_000
    """Pixels to fit."""
    k: Annotated[int, Field(ge=2, le=65536)] = 512
    """Colours."""
    rounds: Count = 5
    """Repetitions of each fit."""
    encode_pixels: Count = 10_000_000
    """Pixels to encode."""


Fit = Callable[[Pixels, int, int], Palette]
"""Pixels (N, 3), number of colours and seed -> palette."""


def palette(settings: BenchPaletteConfig) -> Report:
    """Return times and squared errors of each fit, and the rate of `Palette.encode`.

    Each round holds out another fifth of the images, because with few images the choice of images changes the error
    more than the algorithm does.
    """
    faiss.omp_set_num_threads(1)
    views = read_views(settings)
    rounds: list[dict[str, Report]] = []
    with threadpool_limits(1):
        for seed in range(settings.rounds):
            pixels, held_out = split(views, settings.pixels, seed)
            rounds.append(compare(pixels, held_out, settings.k, seed))
    ratios = [fits["ours"]["held_out_mse"] / fits["sklearn_lloyd_25"]["held_out_mse"] for fits in rounds]
    return {
        "pixels": len(pixels),
        "rounds": settings.rounds,
        "fits": {name: medians([fits[name] for fits in rounds]) for name in FITS},
        "held_out_mse_ratio_to_sklearn": [round(ratio, 4) for ratio in ratios],
        **encode_rates(pixels, settings.encode_pixels),
    }


def ours(pixels: Pixels, k: int, seed: int) -> Palette:
    return Palette.fit(np.bincount(pack(pixels), minlength=COLOURS), k, seed)


def faiss_defaults(pixels: Pixels, k: int, seed: int) -> Palette:
    kmeans = faiss.Kmeans(3, k, seed=seed + 1)
    kmeans.train(scale(pixels))
    return Palette(np.asarray(kmeans.centroids, np.float32))


def sklearn_lloyd_25(pixels: Pixels, k: int, seed: int) -> Palette:
    """tol=0 disables early stopping, so that all 25 iterations run."""
    kmeans = KMeans(k, n_init=1, max_iter=25, tol=0, algorithm="lloyd", random_state=seed)
    return Palette(kmeans.fit(scale(pixels)).cluster_centers_.astype(np.float32))


def sklearn_minibatch(pixels: Pixels, k: int, seed: int) -> Palette:
    kmeans = MiniBatchKMeans(k, n_init=1, random_state=seed)
    return Palette(kmeans.fit(scale(pixels)).cluster_centers_.astype(np.float32))


FITS: dict[str, Fit] = {fit.__name__: fit for fit in (ours, faiss_defaults, sklearn_lloyd_25, sklearn_minibatch)}


def read_views(settings: BenchPaletteConfig) -> Pixels:
    """Centre views of all readable images (N, n_px, n_px, 3)."""
    units = sources.plan(settings.images, 1000).units
    readable = [image for unit in units for image in sources.read(unit) if isinstance(image, sources.Image)]
    return np.stack([images.centre_view(image.data, settings.n_px) for image in readable])


def split(views: Pixels, n: int, seed: int) -> tuple[Pixels, Pixels]:
    """n random pixels of four fifths of the images, and all pixels of the last fifth."""
    held_out = np.arange(len(views)) % 5 == seed % 5
    pixels = views[~held_out].reshape(-1, 3)
    return pixels[np.random.default_rng(seed).permutation(len(pixels))[:n]], views[held_out].reshape(-1, 3)


def compare(pixels: Pixels, held_out: Pixels, k: int, seed: int) -> dict[str, Report]:
    """Times and squared errors of each fit to the same pixels."""
    runs = in_turn({name: partial(fit, pixels, k, seed) for name, fit in FITS.items()}, 1)
    return {
        name: {
            "seconds": runs.wall[name][0],
            "cpu_seconds": runs.cpu[name][0],
            "mse": mse(fitted, pixels),
            "held_out_mse": mse(fitted, held_out),
        }
        for name, fitted in runs.results.items()
    }


def medians(rounds: list[Report]) -> Report:
    return {name: round(float(np.median([report[name] for report in rounds])), 2) for name in rounds[0]}


def mse(palette: Palette, pixels: Pixels) -> float:
    """Mean squared distance of a pixel to the nearest colour, in 8-bit units, summed over the channels."""
    index = faiss.IndexFlatL2(3)
    index.add(np.ascontiguousarray(palette.colours))
    nearest = index.search(scale(pixels), 1)[1][:, 0]
    error = (scale(pixels).astype(np.float64) - palette.colours[nearest]) * 127.5
    return float((error**2).sum(1).mean())


def encode_rates(pixels: Pixels, n: int) -> Report:
    """Megapixels per second on one core of `Palette.encode`, and of a bare gather with precomputed indices."""
    openai = Palette.load("openai")
    repeated = np.resize(pixels, (n, 3))
    tokens, table = openai.encode(repeated), openai._table
    order = pack(repeated[:, ::-1]).astype(np.intp)
    alternatives: dict[str, Callable[[], Any]] = {
        "encode": lambda: openai.encode(repeated),
        "gather": lambda: np.take(table, order, out=tokens, mode="clip"),
    }
    runs = in_turn(alternatives, rounds=9)
    return {
        f"{name}_mpx_per_{unit}": round(n / 1e6 / float(np.median(seconds[name])), 1)
        for name in alternatives
        for unit, seconds in (("second", runs.wall), ("cpu_second", runs.cpu))
    }
