"""Figures: accuracy with its interval, F1, and what stands beside them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from pipeline.metrics import classification_metrics, wilson_interval


@given(st.integers(1, 5000), st.data())
def test_an_interval_holds_the_share_and_stays_between_nought_and_one(rows: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, rows))
    low, high = wilson_interval(correct, rows)
    assert 0 <= low < high <= 1
    assert low - 1e-12 <= correct / rows <= high + 1e-12
    wider_low, wider_high = wilson_interval(correct, rows, z=2.58)
    assert wider_low <= low + 1e-12
    assert wider_high >= high - 1e-12


@given(st.integers(1, 500), st.data())
def test_ten_times_the_rows_make_the_interval_narrower(rows: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, rows))
    (low, high), (lower, higher) = wilson_interval(correct, rows), wilson_interval(10 * correct, 10 * rows)
    assert higher - lower < high - low


@pytest.mark.parametrize(
    ("correct", "rows", "low", "high"),
    [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (50, 100, 0.404, 0.596)],
)
def test_intervals_are_wilsons(correct: int, rows: int, low: float, high: float) -> None:
    assert wilson_interval(correct, rows) == pytest.approx((low, high), abs=6e-4)


def test_without_rows_nothing_is_known() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    found = classification_metrics(np.zeros(0, np.int64), np.zeros(0, np.int64), ["a", "b"])
    assert found["rows"] == 0
    assert found["accuracy"] == 0
    assert (found["accuracy_low"], found["accuracy_high"]) == (0, 1)


def test_figures_are_those_of_a_worked_example() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1])
    predicted = np.array([0, 0, 0, 1, 1, 2])
    found = classification_metrics(predicted, truth, ["a", "b", "c"])
    assert found["rows"] == 6
    assert found["accuracy"] == pytest.approx(4 / 6, abs=1e-6)
    a, b, c = (found["per_label"][name] for name in "abc")
    assert (a["precision"], a["recall"], a["rows"]) == (1, 0.75, 4)
    assert (b["precision"], b["recall"], b["rows"]) == (0.5, 0.5, 2)
    assert (c["precision"], c["recall"], c["rows"]) == (0, 0, 0)
    assert a["f1"] == pytest.approx(2 * 0.75 / 1.75, abs=1e-6)
    # "c" is in no true row, so that it has no part in the mean.
    assert found["macro_f1"] == pytest.approx((a["f1"] + b["f1"]) / 2, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_figures_do_not_depend_on_the_order_of_rows(pairs: list[tuple[int, int]]) -> None:
    names = ["a", "b", "c", "d"]
    predicted, truth = np.array(pairs).T
    found = classification_metrics(predicted, truth, names)
    assert classification_metrics(predicted[::-1], truth[::-1], names) == found
    assert sum(each["rows"] for each in found["per_label"].values()) == len(pairs)
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_figures_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predicted, truth = np.array(pairs).T
    found = classification_metrics(predicted, truth, ["a", "b", "c", "d"])
    expected = precision_recall_fscore_support(truth, predicted, labels=range(4), average=None, zero_division=0)
    for i, each in enumerate(found["per_label"].values()):
        for key, column in zip(("precision", "recall", "f1", "rows"), expected, strict=True):
            assert each[key] == pytest.approx(column[i], abs=1e-6)
