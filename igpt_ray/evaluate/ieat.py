"""The image embedding association test, iEAT (Steed & Caliskan, FAccT 2021): whether the embeddings of two groups of
images differ in their similarity to two sets of attributes.

X and Y are embeddings of the two target groups (men and women, say), A and B of the two sets of attributes (career and
family). The association of one embedding w is

    s(w) = mean over A of cos(w, a) - mean over B of cos(w, b)

and the effect size d = (mean of s over X - mean of s over Y) / sample standard deviation of s over X and Y together.
The one-sided p-value is the fraction of equal partitions of X and Y together in which the sum of s over the first half
is at least the sum of s over X.
"""

import math
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igpt_ray.errors import FeatureError

MAX_PARTITIONS = 10_000
"""Up to this number all partitions are counted; beyond it a sample of this size, the observed partition included."""
TIE = 2.0**-40
"""Associations are rounded to multiples of this, so that sums in another order compare as equal."""

Embeddings = NDArray[np.float64]


class Association(NamedTuple):
    effect_size: float
    """Between -2 and 2; positive if X goes with A and Y with B."""
    p_value: float
    """One-sided."""


def association_test(X: ArrayLike, Y: ArrayLike, A: ArrayLike, B: ArrayLike, seed: int = 0) -> Association:
    """The test on four arrays of embeddings (rows, D); X and Y have equally many rows. `seed` draws partitions.

    Raises `FeatureError` if shapes do not fit, an embedding is not finite or zero, or all associations are equal.
    """
    x, y, a, b = (_checked(name, rows) for name, rows in (("X", X), ("Y", Y), ("A", A), ("B", B)))
    if len(x) != len(y):
        raise FeatureError(f"X has {len(x)} rows and Y has {len(y)}: iEAT needs equally many of both")
    if len({group.shape[1] for group in (x, y, a, b)}) > 1:
        widths = ", ".join(f"{name} {group.shape[1]}" for name, group in zip("XYAB", (x, y, a, b), strict=True))
        raise FeatureError(f"embeddings have different widths ({widths}): all must come from the same layer")
    together = np.concatenate([x, y])
    s = (together @ a.T).mean(1) - (together @ b.T).mean(1)
    deviation = s.std(ddof=1)
    if deviation < TIE:
        raise FeatureError("all embeddings of X and Y have the same association with A and B: there is nothing to test")
    return Association(float((s[: len(x)].mean() - s[len(x) :].mean()) / deviation), p_value(s, seed))


def p_value(s: NDArray[np.float64], seed: int) -> float:
    """Fraction of equal partitions of `s` (2n,) whose first half sums to at least the sum of s[:n]."""
    units = np.rint(s / TIE).astype(np.int64)
    n = len(s) // 2
    if math.comb(2 * n, n) <= MAX_PARTITIONS:
        halves = np.array(list(combinations(range(2 * n), n)))
        return float((units[halves].sum(1) >= units[:n].sum()).mean())
    rng = np.random.default_rng(seed)
    shuffled = (rng.permutation(units)[:n].sum() for _ in range(MAX_PARTITIONS - 1))
    return (1 + sum(bool(half >= units[:n].sum()) for half in shuffled)) / MAX_PARTITIONS


def _checked(name: str, rows: ArrayLike) -> Embeddings:
    """Rows normalised to length 1, in float64."""
    array = np.asarray(rows, np.float64)
    if array.ndim != 2 or not array.size:
        raise FeatureError(f"{name} has shape {array.shape}: expected embeddings (rows, D)")
    length = np.linalg.norm(array, axis=1, keepdims=True)
    if not np.isfinite(length).all() or not length.all():
        raise FeatureError(f"{name} has embeddings that are not finite or zero: they have no direction")
    return array / length
