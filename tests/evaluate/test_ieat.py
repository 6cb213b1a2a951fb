"""iEAT reproduces published figures, and equals its definition on small examples."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from igpt_ray.errors import FeatureError
from igpt_ray.evaluate import ieat

Groups = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def groups(n: int, seed: int = 0) -> Groups:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 6)), rng.normal(size=(n, 6)), rng.normal(size=(5, 6)), rng.normal(size=(7, 6))


def by_hand(w: np.ndarray, A: np.ndarray, B: np.ndarray) -> float:
    def cos(u: np.ndarray, v: np.ndarray) -> float:
        return float(u @ v / math.sqrt(u @ u) / math.sqrt(v @ v))

    return sum(cos(w, a) for a in A) / len(A) - sum(cos(w, b) for b in B) / len(B)


def test_the_published_test_of_weight_is_reproduced(shared: Path) -> None:
    """With the sample deviation, and with the observed partition in the p-value."""
    golden = np.load(shared / "golden/ieat/weight.npz")
    found = ieat.association_test(*(golden[name] for name in "XYAB"))
    assert found.effect_size == pytest.approx(float(golden["effect_size"]), abs=1e-10)
    assert found.p_value == float(golden["p_value"])


def test_effect_and_p_equal_the_definition() -> None:
    """n = 4 has 70 partitions, which are all evaluated."""
    X, Y, A, B = groups(4)
    s = [by_hand(w, A, B) for w in (*X, *Y)]
    mean = sum(s) / 8
    deviation = math.sqrt(sum((value - mean) ** 2 for value in s) / 7)
    halves = [sum(s[i] for i in half) for half in combinations(range(8), 4)]
    found = ieat.association_test(X, Y, A, B)
    assert found.effect_size == pytest.approx((sum(s[:4]) / 4 - sum(s[4:]) / 4) / deviation, abs=1e-12)
    assert found.p_value == sum(half >= halves[0] - 1e-9 for half in halves) / 70


def test_swapping_groups_or_attributes_changes_the_sign() -> None:
    X, Y, A, B = groups(4, seed=1)
    assert ieat.association_test(Y, X, A, B).effect_size == pytest.approx(
        -ieat.association_test(X, Y, A, B).effect_size
    )
    assert ieat.association_test(Y, X, B, A).effect_size == pytest.approx(ieat.association_test(X, Y, A, B).effect_size)


def test_equal_sums_count_in_any_order_of_summation() -> None:
    """With two groups of the same images, rounding puts half of the sums an ulp below the observed one."""
    X, _, A, B = groups(4, seed=2)
    s = [by_hand(w, A, B) for w in (*X, *X)]
    at_least = [sum(s[i] for i in half) >= sum(s[:4]) - 1e-9 for half in combinations(range(8), 4)]
    assert ieat.association_test(X, X[::-1], A, B).p_value == sum(at_least) / 70


def test_beyond_ten_thousand_partitions_p_is_of_a_seeded_sample_and_the_observed_one() -> None:
    X, Y, A, B = groups(9, seed=3)
    found = [ieat.association_test(X, Y, A, B, seed).p_value for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found[0] == pytest.approx(found[2], abs=0.03)
    assert found[0] * ieat.MAX_PARTITIONS == pytest.approx(round(found[0] * ieat.MAX_PARTITIONS))
    far = X + 50 * A.mean(0)
    assert ieat.association_test(far, Y - 50 * A.mean(0), A, B).p_value == 1 / ieat.MAX_PARTITIONS


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda X, Y, A, B: (X[:3], Y, A, B), "X has 3 rows and Y has 4"),
        (lambda X, Y, A, B: (X, Y, A[:, :5], B), "different widths .*X 6, Y 6, A 5, B 6"),
        (lambda X, Y, A, B: (X, Y, A[0], B), r"A has shape \(6,\): expected"),
        (lambda X, Y, A, B: (X, Y, A, B[:0]), r"B has shape \(0, 6\)"),
        (lambda X, Y, A, B: (X * np.nan, Y, A, B), "X has embeddings that are not finite"),
        (lambda X, Y, A, B: (X, Y * 0, A, B), "Y has embeddings .* or zero"),
        (lambda X, Y, A, B: (X, Y, A, A), "nothing to test"),
    ],
)
def test_invalid_sets_are_errors(change: object, complaint: str) -> None:
    with pytest.raises(FeatureError, match=complaint):
        ieat.association_test(*change(*groups(4)))
