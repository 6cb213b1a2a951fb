"""Early stopping: the same decisions as a search through all metrics, from state of constant size."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from igpt_ray.train.early_stopping import EarlyStopping

LINES = st.lists(
    st.one_of(
        st.just({"nats_per_token": 1.0}),
        st.sampled_from([0.1, 0.2, 0.3]).map(lambda accuracy: {"val_accuracy": accuracy}),
    )
)


@given(LINES, st.integers(1, 4), st.data())
def test_decisions_are_those_of_a_search_through_all_lines(
    lines: list[dict[str, Any]], patience: int, data: st.DataObject
) -> None:
    """Ties keep the earlier one, lines without evaluation do not count, and a resumed run knows its best."""
    resumed_at = data.draw(st.integers(0, len(lines)))
    stopping = EarlyStopping(patience, lines[:resumed_at])
    for n, line in enumerate(lines[resumed_at:], resumed_at + 1):
        is_best = stopping.observe(line)
        evaluations = [seen["val_accuracy"] for seen in lines[:n] if "val_accuracy" in seen]
        if not evaluations:
            assert not is_best
            assert not stopping.should_stop
            continue
        first_best = evaluations.index(max(evaluations))
        assert stopping.should_stop == (len(evaluations) - 1 - first_best >= patience)
        assert is_best == ("val_accuracy" in line and first_best == len(evaluations) - 1)


def test_pretraining_never_stops_early() -> None:
    stopping = EarlyStopping(None, [{"val_accuracy": 0.5}] * 50)
    assert not stopping.should_stop
    assert stopping.best is None
