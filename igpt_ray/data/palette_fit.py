"""Fit a palette to the training split of a source: work units -> histogram of prepared pixels -> k-means.

The mapper runs `CountColours` on every work unit. The caller's process adds up the histograms (2^24 counts).
"""

import functools
import json
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from igpt_ray import storage
from igpt_ray.data import pixels as images
from igpt_ray.data import sources
from igpt_ray.data.config import PaletteConfig, PixelsConfig
from igpt_ray.data.decoding import decode
from igpt_ray.data.mapper import Mapper
from igpt_ray.data.palette import COLOURS, Palette, pack, quality, sidecar, swatches
from igpt_ray.data.sources import TRAIN, UnreadableImage, WorkUnit
from igpt_ray.errors import ImageError, SourceError
from igpt_ray.progress import Progress
from igpt_ray.provenance import provenance

PALETTE_UNIT = 1000
"""Images per task while sampling pixels."""


def fit_palette(settings: PaletteConfig, mapper: Mapper) -> dict[str, Any]:
    """Fit k colours to a sample of the training images, and write the palette's .npy, .json and .png files.

    Raises `SourceError` if the source has no training images.
    """
    started = time.perf_counter()
    plan = sources.plan(settings.source, PALETTE_UNIT, settings.layout, settings.columns)
    units = [unit for unit in plan.units if unit.split == TRAIN]
    total = sum(unit.images for unit in units)  # estimated for archives, so the sample size is approximate as well
    if total == 0:
        raise SourceError(f"{settings.source} has no {TRAIN} split to fit a palette on")
    arguments = {"pixels": settings.pixels, "fraction": settings.images / total, "seed": settings.seed}
    histogram = np.zeros(COLOURS, np.int64)
    n_sampled = n_unreadable = 0
    progress = Progress("palette", len(units), "units")
    for counts in mapper(units, CountColours, arguments, settings.pool):
        histogram[counts.colours] += counts.counts
        n_sampled += counts.images
        n_unreadable += counts.unreadable
        progress.add(1, f"{n_sampled:,} images sampled")
    palette = Palette.fit(histogram, settings.k, settings.seed, settings.gpu)
    report = {
        "palette": settings.out,
        "fingerprint": palette.fingerprint,
        "k": settings.k,
        "device": "gpu" if settings.gpu else "cpu",
        "pipeline": images.pipeline_id(settings.pixels.pipeline, settings.pixels.view),
        "images": n_sampled,
        "unreadable": n_unreadable,
        **quality(palette, histogram),
        "seconds": round(time.perf_counter() - started, 2),
    }
    palette.save(settings.out)
    storage.write(sidecar(settings.out), json.dumps({**report, "made_by": provenance(settings)}).encode())
    storage.write(sidecar(settings.out, ".png"), images.png(swatches(palette)))
    return report


class ColourCounts(NamedTuple):
    """The distinct prepared colours of a unit (packed) and the number of pixels of each."""

    colours: NDArray[np.uint32]
    counts: NDArray[np.int64]
    images: int
    unreadable: int


class CountColours:
    """Maps a work unit to the `ColourCounts` of a seeded sample of its images."""

    def __init__(self, pixels: PixelsConfig, fraction: float, seed: int):
        self.pixels = pixels
        self.pipeline = images.pipeline_id(pixels.pipeline, pixels.view)
        self.key_filter = functools.partial(sources.sampled, fraction=fraction, seed=seed)

    def __call__(self, unit: WorkUnit) -> ColourCounts:
        views, n_unreadable = [], 0
        for image in sources.read(unit, self.key_filter):
            if isinstance(image, UnreadableImage):
                n_unreadable += 1
                continue
            try:
                training = unit.split == TRAIN
                views.append(
                    decode(images.configured_view, image.data, self.pixels, self.pipeline, training, image.key, 0)
                )
            except ImageError:
                n_unreadable += 1  # preparation records the key and the reason; here the image is only skipped
        packed = pack(np.stack(views)) if views else np.empty(0, np.uint32)
        colours, counts = np.unique(packed, return_counts=True)
        return ColourCounts(colours, counts, len(views), n_unreadable)
