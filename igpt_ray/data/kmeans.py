"""k-means on colours with weights: (points, weights) -> k centres. faiss does the Lloyd iterations.

Lloyd's algorithm converges to a local optimum close to its initial centres, so most of the work is the initialisation,
which uses fewer points:

1. Colours are merged into cells of a 64^3 grid, and of a 128^3 grid: a tenth to half as many points.
2. On the coarser grid, clusters are split repeatedly, each time those whose split reduces the cost most.
3. On each grid, centres whose removal costs little move into clusters that gain most from a second centre.
4. Lloyd iterations run on all distinct colours, and a last one in float64.

The algorithm uses no random numbers.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from igpt_ray.errors import PaletteError

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

GRIDS = (6, 7)
"""Bits per channel of the grids on which centres are initialised."""
CELLS_PER_CENTRE = 16
"""A grid with fewer occupied cells per centre is skipped."""
SETTLE, MOVES, POLISH = 5, 8, 10
"""Lloyd iterations after a move; rounds of moves per grid; Lloyd iterations on all colours."""
MOVE_WORK = 1 << 30
"""Most distances per Lloyd iteration for which moves are tried, as for a 128^3 grid with about 4,096 centres."""
MIN_GAIN = 0.3
"""Try a move if its estimated gain exceeds this share of its estimated loss: both estimates are pessimistic."""


class Points(NamedTuple):
    """Points to cluster: (n, 3) float32 in [-1, 1], and the number of occurrences of each, (n,) float64."""

    xyz: Floats
    weights: NDArray[np.float64]


class Fit(NamedTuple):
    """Centres (k, 3), the index of the nearest centre for each point, and the sum of weighted squared distances."""

    centres: Floats
    labels: Labels
    cost: float


def fit(points: Points, k: int, seed: int = 0, gpu: bool = False) -> Floats:
    """k centres in no particular order. `seed` is passed to faiss, which does not use it with given initial centres."""
    lloyd = Lloyd(seed, gpu)
    grids = [grid for bits in GRIDS if len((grid := merge(points, bits)).xyz) >= CELLS_PER_CENTRE * k] or [points]
    centres = split(grids[0], k)
    for grid in grids:
        if len(grid.xyz) * k <= MOVE_WORK:
            centres = move(grid, centres, lloyd)
    polished = lloyd(points, centres, POLISH)
    # faiss sums in float32, which is imprecise for counts of many millions: the last step is done here in float64.
    total, exact = means(points, polished.labels, k)
    return np.where(total[:, None] > 0, exact, polished.centres).astype(np.float32)


def merge(points: Points, bits: int) -> Points:
    """One point for each occupied cell of a grid with `bits` bits per channel: the cell's mean and total weight."""
    cell = np.minimum((points.xyz + 1) * (1 << bits - 1), (1 << bits) - 1).astype(np.int64)
    _, labels = np.unique(cell @ [1 << 2 * bits, 1 << bits, 1], return_inverse=True)
    total, centres = means(points, labels, int(labels.max()) + 1)
    return Points(centres.astype(np.float32), total)


def split(points: Points, k: int) -> Floats:
    """k centres by bisecting clusters. Each round bisects up to half of the clusters, those with the largest gain."""
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
    """Move low-cost centres into high-gain clusters while the cost falls; after a failed round, move fewer.

    The points of a removed centre go to other centres, at worst all to its nearest neighbour: an upper bound of the
    loss. A second centre in a cluster saves at least what bisecting saves: a lower bound of the gain. The bounds only
    select candidates. The cost after a few Lloyd iterations decides.
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


def _moved(points: Points, current: Fit, n: int) -> Floats | None:
    """The centres with up to n of them moved; None if no move passes the threshold."""
    k = len(current.centres)
    gain, _, pairs = halves(points, current.labels, k)
    loss = np.bincount(current.labels, points.weights, k) * _neighbour_distance(current.centres)
    idle = _largest(-loss, n)
    gain[idle] = 0
    busy = _largest(gain, n)
    accepted = gain[busy] > MIN_GAIN * loss[idle]
    if not accepted.any():
        return None
    moved = current.centres.copy()
    moved[idle[accepted]], moved[busy[accepted]] = pairs[busy[accepted], 0], pairs[busy[accepted], 1]
    return moved


def halves(points: Points, labels: Labels, k: int) -> tuple[NDArray[np.float64], NDArray[np.bool_], Floats]:
    """Bisect every cluster at its mean, perpendicular to its principal axis.

    Returns the reduction of the cost (k,), zero for clusters that cannot be bisected; which points lie in the upper
    half (n,); and the means of both halves (k, 2, 3).
    """
    _, centres = means(points, labels, k)
    offsets = points.xyz - centres[labels]
    covariance = np.empty((k, 3, 3))
    for i in range(3):
        for j in range(i + 1):
            covariance[:, i, j] = np.bincount(
                labels, points.weights * offsets[:, i] * offsets[:, j], k
            )  # eigh reads i >= j
    principal = np.linalg.eigh(covariance)[1][:, :, 2]
    upper = (offsets * principal[labels]).sum(1) > 0
    total, pairs = means(points, 2 * labels + upper, 2 * k)
    total, pairs = total.reshape(k, 2), pairs.reshape(k, 2, 3)
    gain = (total * ((pairs - centres[:, None]) ** 2).sum(-1)).sum(1)
    return np.where((total > 0).all(1), gain, 0), upper, pairs.astype(np.float32)


def means(points: Points, labels: Labels, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight (k,) and weighted mean (k, 3) of each cluster in float64. The mean of an empty cluster is zero."""
    total = np.bincount(labels, points.weights, k).astype(np.float64)
    sums = np.stack([np.bincount(labels, points.weights * x, k) for x in points.xyz.T], axis=1)
    return total, sums / np.where(total > 0, total, 1)[:, None]


class Lloyd:
    """faiss's k-means with given initial centres, on the CPU or on one GPU.

    On a GPU, faiss searches the nearest centres there in tiles of bounded memory; sums are computed on the CPU. The
    resources of the GPU are created once, because each creation allocates 1.5 GB on it and 256 MB of pinned memory.
    """

    def __init__(self, seed: int, gpu: bool):
        import faiss

        self.faiss = faiss
        if gpu:
            _check_gpu(faiss)
        self.resources = faiss.StandardGpuResources() if gpu else None
        # faiss subsamples the points above the first limit per centre, and warns below the second
        self.options: dict[str, Any] = {"max_points_per_centroid": 1 << 24, "min_points_per_centroid": 1}
        self.options |= {"seed": seed % (1 << 31)}

    def __call__(self, points: Points, centres: Floats, iterations: int) -> Fit:
        kmeans = self.faiss.Kmeans(3, len(centres), niter=iterations, **self.options)
        if self.resources is not None:
            kmeans.index = self.faiss.GpuIndexFlatL2(self.resources, 3)
        kmeans.train(points.xyz, weights=points.weights.astype(np.float32), init_centroids=centres)
        squared, labels = kmeans.index.search(points.xyz, 1)
        cost = float((squared[:, 0] * points.weights).sum())
        return Fit(np.asarray(kmeans.centroids, np.float32), labels[:, 0], cost)


def _check_gpu(faiss: Any) -> None:
    """Raise `PaletteError` if faiss cannot use a GPU: the package is faiss-cpu, or no GPU is visible."""
    if not hasattr(faiss, "StandardGpuResources"):
        raise PaletteError(
            f"the installed faiss {faiss.__version__} has no GPU code: install the extra [gpu] instead of [cpu], or"
            " cluster on the CPU without --gpu"
        )
    if faiss.get_num_gpus() == 0:
        raise PaletteError(
            f"faiss-gpu {faiss.__version__} is installed, but this process sees no GPU. The clustering runs in the"
            " process of the job, by default on the head node: submit the job with --entrypoint-num-gpus 1 and check"
            " nvidia-smi there, or cluster on the CPU without --gpu"
        )


def _neighbour_distance(centres: Floats) -> NDArray[np.float64]:
    """Squared distance of each centre to its nearest neighbour, (k,)."""
    import faiss

    index = faiss.IndexFlatL2(3)
    index.add(centres)
    return index.search(centres, 2)[0][:, 1].astype(np.float64)


def _largest(values: NDArray[np.float64], n: int) -> Labels:
    """Indices of the n largest values in descending order; ties keep their order."""
    return np.argsort(-values, kind="stable")[:n]
