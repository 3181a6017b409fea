"""The publish gate: what looks worse, and what is only noise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.gate import Measures, reasons_to_hold
from pipeline.task import Gate

OLD = Measures(("good", "bad"), 1000, {"good": 600, "bad": 400}, (0.9, 400))


def changed(**changes: Any) -> Measures:
    return Measures(**{**vars(OLD), **changes})


def held(new: Measures, old: Measures = OLD, **limits: Any) -> list[str]:
    return reasons_to_hold(new, old, Gate(**limits))


def test_an_equal_version_and_a_better_one_pass() -> None:
    assert held(OLD) == []
    assert held(changed(rows=2000, cross_validated=(0.95, 400), label_counts={"good": 1200, "bad": 800})) == []


def test_a_fall_of_accuracy_beyond_the_limit_and_beyond_chance_holds() -> None:
    [reason] = held(changed(cross_validated=(0.8, 400)))
    assert reason == ("cross-validated accuracy fell from 90.0 % (400 rows) to 80.0 % (400 rows), by more than 5.0 %")
    assert held(changed(cross_validated=(0.85, 400))) == []  # not more than the limit
    assert held(changed(cross_validated=(0.8, 400)), cv_drop=0.2) == []


@pytest.mark.parametrize(("rows", "holds"), [(40, False), (400, True)])
def test_on_few_rows_the_same_fall_is_noise(rows: int, holds: bool) -> None:
    old = changed(cross_validated=(0.9, rows))
    assert bool(held(changed(cross_validated=(0.8, rows)), old)) is holds


@pytest.mark.parametrize("missing", [None, (0.0, 0)])
def test_without_cross_validation_on_one_side_accuracy_says_nothing(missing: tuple[float, int] | None) -> None:
    assert held(changed(cross_validated=missing)) == []
    assert held(changed(cross_validated=(0.1, 400)), changed(cross_validated=missing)) == []


def test_label_shares_that_shift_beyond_the_limit_hold() -> None:
    assert held(changed(label_counts={"good": 400, "bad": 600})) == []
    [reason] = held(changed(label_counts={"good": 390, "bad": 610}))
    assert reason == ("label shares shifted by 21.0 %, by more than 20.0 %; most of all 'good', from 60.0 % to 39.0 %")
    assert held(changed(label_counts={"good": 390, "bad": 610}), share_shift=0.5) == []


def test_a_label_without_rows_any_more_holds_whatever_the_limits() -> None:
    [reason] = held(changed(label_counts={"good": 1000, "bad": 0}), share_shift=1)
    assert reason == "no row has the label 'bad' any more; 400 rows had it"
    assert held(changed(label_counts={"good": 1000, "bad": 0}), changed(label_counts={"good": 1000, "bad": 0})) == []


def test_far_fewer_rows_hold() -> None:
    assert held(changed(rows=500)) == []
    assert held(changed(rows=499)) == ["499 rows are fewer than 0.5 times the 1,000 rows of the version in force"]
    assert held(changed(rows=499), min_rows=0) == []


@pytest.mark.parametrize("labels", [("bad", "good"), ("good", "bad", "ugly"), ("good",)])
def test_other_labels_or_another_order_are_another_task(labels: tuple[str, ...]) -> None:
    assert held(changed(labels=labels, rows=1, label_counts=dict.fromkeys(labels, 0))) == []


def test_a_gate_that_is_switched_off_holds_nothing() -> None:
    assert held(changed(rows=1), enabled=False) == []


def test_every_reason_is_told() -> None:
    worse = changed(rows=10, label_counts={"good": 0, "bad": 10}, cross_validated=(0.2, 400))
    assert len(held(worse)) == 4


counts = st.fixed_dictionaries({"good": st.integers(0, 50), "bad": st.integers(0, 50)})
measured = st.builds(
    Measures,
    st.just(("good", "bad")),
    st.integers(0, 100),
    counts,
    st.none() | st.tuples(st.integers(0, 40).map(lambda right: right / 40), st.just(40)),
)


@given(measured, measured)
def test_any_two_versions_can_be_compared_and_none_is_worse_than_itself(new: Measures, old: Measures) -> None:
    assert all(held(new, old))
    assert held(new, new) == []


def test_measures_come_from_a_versions_own_files() -> None:
    manifest = {"labels": ["good", "bad"], "rows": {"review": 100, "rest": 900}}
    metrics: dict[str, Any] = {
        "summary": {"label_counts": {"good": 600, "bad": 400}},
        "cross_validation": {"p0": {"accuracy": 0.5, "rows": 400}, "weighted": {"accuracy": 0.9, "rows": 400}},
    }
    assert Measures.of(manifest, metrics) == OLD
    assert Measures.of(manifest, {**metrics, "cross_validation": None}) == changed(cross_validated=None)
