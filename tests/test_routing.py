"""Which rows people look at first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.routing import lowest, priorities, reasons

shares = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0]), min_size=1, max_size=20)


def floats(values: list[float]) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, np.inf]), max_size=20), st.integers(0, 25), st.integers(1, 6))
def test_the_lowest_margins_are_chosen_in_order_and_ties_by_row(values: list[float], count: int, cuts: int) -> None:
    rows, margins = lowest(np.array_split(floats(values), cuts), count)
    expected = sorted((i for i, value in enumerate(values) if value < np.inf), key=lambda i: (values[i], i))[:count]
    assert rows.tolist() == expected
    assert margins.tolist() == floats([values[i] for i in expected]).tolist()


@given(st.lists(st.tuples(st.sampled_from([0, 0.1, 0.4, 1]), st.sampled_from([0, 0.2, 0.7])), min_size=1, max_size=20))
def test_a_row_that_is_less_sure_and_more_disputed_is_never_less_urgent(pairs: list[tuple[float, float]]) -> None:
    margins, disputed = floats([m for m, _ in pairs]), floats([d for _, d in pairs])
    urgency = priorities(margins, disputed)
    assert ((urgency >= 0) & (urgency <= 1)).all()
    for i in range(len(pairs)):
        for j in range(len(pairs)):
            if margins[i] <= margins[j] and disputed[i] >= disputed[j]:
                assert urgency[i] >= urgency[j]


def test_the_most_urgent_row_has_one_and_the_least_urgent_nought() -> None:
    assert priorities(floats([0.9, 0.1, 0.5]), floats([0.0, 0.8, 0.3])).tolist() == [0, 1, 0.5]


def test_scales_do_not_matter_only_ranks() -> None:
    margins, disputed = floats([0.3, 0.1, 0.2, 0.9]), floats([0.1, 0.4, 0.2, 0.3])
    assert priorities(margins / 1000, disputed).tolist() == priorities(margins, disputed).tolist()


def test_rows_that_cannot_be_told_apart_are_equally_urgent() -> None:
    assert priorities(floats([0.2] * 4), floats([0.1] * 4)).tolist() == [0.5] * 4


def test_a_single_row_and_no_row_are_fine() -> None:
    assert priorities(floats([0.4]), floats([0.0])).tolist() == [1]
    assert priorities(floats([]), floats([])).tolist() == []


@pytest.mark.parametrize(
    ("margin", "disagreement", "expected"),
    [
        (0.1, 0.9, ["low_margin", "annotators_disagree"]),
        (0.1, 0.1, ["low_margin"]),
        (0.9, 0.9, ["annotators_disagree"]),
        (0.9, 0.1, ["budget"]),
    ],
)
def test_reasons_are_what_puts_a_row_above_the_queues_median(
    margin: float, disagreement: float, expected: list[str]
) -> None:
    assert reasons(margin, disagreement, 0.5, 0.5) == expected
