"""k-means on colours with weights: (points, weights) -> k centres. faiss does the Lloyd iterations.

Lloyd's algorithm ends near where it starts, so most of the work is a good start, on few points:

1. Colours are merged into cells of a 64^3 grid, then of a 128^3 grid: a tenth to half as many points.
2. On the coarser grid one cluster is split again and again, where a cut saves most.
3. On each grid, centres that serve little are moved into clusters that would gain most from a second one.
4. Lloyd iterations on all distinct colours, and one more in float64.

Nothing is drawn at random.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from igpt_ray.errors import PaletteError

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

GRIDS = (6, 7)
"""Bits a channel of the grids on which centres are placed."""
CELLS_PER_CENTRE = 16
"""A grid with fewer cells is too coarse to place centres on."""
SETTLE, MOVES, POLISH = 5, 8, 10
"""Lloyd iterations after a change; rounds of moves on a grid; Lloyd iterations on all colours."""
MOVE_WORK = 1 << 30
"""Most distances per Lloyd iteration for which moves are tried: a 128^3 grid at some 4,096 centres."""
HOPE = 0.3
"""Try a move whose estimated gain is this share of its estimated loss: both estimates are pessimistic."""


class Points(NamedTuple):
    """What is clustered: (n, 3) float32 in [-1, 1], and how often each occurs, (n,) float64."""

    xyz: Floats
    weights: NDArray[np.float64]


class Fit(NamedTuple):
    """Centres, (k, 3); the nearest of them for each point; and the sum of weighted squared distances."""

    centres: Floats
    labels: Labels
    cost: float


def fit(points: Points, k: int, seed: int = 0, gpu: bool = False) -> Floats:
    """k centres, in no particular order. `seed` goes to faiss, which draws nothing as long as the start is given."""
    lloyd = Lloyd(seed, gpu)
    grids = [grid for bits in GRIDS if len((grid := merge(points, bits)).xyz) >= CELLS_PER_CENTRE * k] or [points]
    centres = split(grids[0], k)
    for grid in grids:
        if len(grid.xyz) * k <= MOVE_WORK:
            centres = move(grid, centres, lloyd)
    polished = lloyd(points, centres, POLISH)
    # faiss sums in float32, which is coarse for counts of many millions: the last step is ours.
    total, exact = means(points, polished.labels, k)
    return np.where(total[:, None] > 0, exact, polished.centres).astype(np.float32)


def merge(points: Points, bits: int) -> Points:
    """One point for each occupied cell of a grid with `bits` bits a channel: the mean and the sum of what is in it."""
    cell = np.minimum((points.xyz + 1) * (1 << bits - 1), (1 << bits) - 1).astype(np.int64)
    _, labels = np.unique(cell @ [1 << 2 * bits, 1 << bits, 1], return_inverse=True)
    total, centres = means(points, labels, int(labels.max()) + 1)
    return Points(centres.astype(np.float32), total)


def split(points: Points, k: int) -> Floats:
    """k centres by halving clusters: in each round the ones that gain most, half as many as there are."""
    labels, n = np.zeros(len(points.xyz), np.int64), 1
    while n < k:
        gain, upper, _ = halves(points, labels, n)
        chosen = _largest(gain, min(k - n, max(1, n // 2)))
        chosen = chosen[gain[chosen] > 0]
        name = np.arange(n)
        name[chosen] = n + np.arange(len(chosen))
        labels = np.where(upper, name[labels], labels)
        n += len(chosen)
    return means(points, labels, k)[1].astype(np.float32)


def move(points: Points, centres: Floats, lloyd: "Lloyd") -> Floats:
    """Move idle centres into busy clusters as long as the cost falls; on failure fewer at a time.

    Without a centre, its points would go to other centres, at worst all to the centre next to it. With a second
    centre, a cluster costs at least what halving it saves less. The first is more than the true loss and the second
    less than the true gain, so both are only used to choose; the cost after some Lloyd iterations decides.
    """
    best = lloyd(points, centres, 2 * SETTLE)
    n = max(1, len(centres) // 8)
    for _ in range(MOVES):
        moved = _moved(points, best, n)
        if moved is None:
            break
        tried = lloyd(points, moved, SETTLE)
        if tried.cost < best.cost:
            best = tried
        elif n == 1:
            break
        else:
            n //= 2
    return best.centres


def _moved(points: Points, now: Fit, n: int) -> Floats | None:
    """The centres with up to n of them moved; None if no move looks promising."""
    k = len(now.centres)
    gain, _, pairs = halves(points, now.labels, k)
    loss = np.bincount(now.labels, points.weights, k) * _to_next(now.centres)
    idle = _largest(-loss, n)
    gain[idle] = 0
    busy = _largest(gain, n)
    worth = gain[busy] > HOPE * loss[idle]
    if not worth.any():
        return None
    moved = now.centres.copy()
    moved[idle[worth]], moved[busy[worth]] = pairs[busy[worth], 0], pairs[busy[worth], 1]
    return moved


def halves(points: Points, labels: Labels, k: int) -> tuple[NDArray[np.float64], NDArray[np.bool_], Floats]:
    """Cut every cluster at its mean, across the direction in which it is longest.

    Returns how much less the two halves cost, (k,), zero where there is nothing to cut; which points lie in the upper
    half, (n,); and the means of both halves, (k, 2, 3).
    """
    _, centres = means(points, labels, k)
    away = points.xyz - centres[labels]
    spread = np.empty((k, 3, 3))
    for i in range(3):
        for j in range(i + 1):
            spread[:, i, j] = np.bincount(labels, points.weights * away[:, i] * away[:, j], k)  # eigh reads i >= j
    longest = np.linalg.eigh(spread)[1][:, :, 2]
    upper = (away * longest[labels]).sum(1) > 0
    total, pairs = means(points, 2 * labels + upper, 2 * k)
    total, pairs = total.reshape(k, 2), pairs.reshape(k, 2, 3)
    gain = (total * ((pairs - centres[:, None]) ** 2).sum(-1)).sum(1)
    return np.where((total > 0).all(1), gain, 0), upper, pairs.astype(np.float32)


def means(points: Points, labels: Labels, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight (k,) and weighted mean (k, 3) of each cluster, in float64; the mean of an empty one is zero."""
    total = np.bincount(labels, points.weights, k).astype(np.float64)
    sums = np.stack([np.bincount(labels, points.weights * x, k) for x in points.xyz.T], axis=1)
    return total, sums / np.where(total > 0, total, 1)[:, None]


class Lloyd:
    """faiss's k-means from given centres, on the CPU or on all GPUs of this machine."""

    def __init__(self, seed: int, gpu: bool):
        import faiss

        if gpu and getattr(faiss, "get_num_gpus", int)() == 0:
            raise PaletteError("faiss sees no GPU: install the extra [gpu] instead of [cpu] and check the driver")
        self.faiss = faiss
        # faiss would take a sample of the points if there were more than this for each centre, and warn below the other
        self.options: dict[str, Any] = {"max_points_per_centroid": 1 << 24, "min_points_per_centroid": 1}
        self.options |= {"seed": seed % (1 << 31), "gpu": gpu}

    def __call__(self, points: Points, centres: Floats, iterations: int) -> Fit:
        kmeans = self.faiss.Kmeans(3, len(centres), niter=iterations, **self.options)
        kmeans.train(points.xyz, weights=points.weights.astype(np.float32), init_centroids=centres)
        squared, labels = kmeans.index.search(points.xyz, 1)
        cost = float((squared[:, 0] * points.weights).sum())
        return Fit(np.asarray(kmeans.centroids, np.float32), labels[:, 0], cost)


def _to_next(centres: Floats) -> NDArray[np.float64]:
    """Squared distance of each centre to the next one, (k,)."""
    import faiss

    index = faiss.IndexFlatL2(3)
    index.add(centres)
    return index.search(centres, 2)[0][:, 1].astype(np.float64)


def _largest(values: NDArray[np.float64], n: int) -> Labels:
    """Indices of the n largest, the largest first; equal ones in order."""
    return np.argsort(-values, kind="stable")[:n]
