"""Folds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cross_validation import stratified_folds

label_lists = st.lists(st.integers(0, 4), min_size=2, max_size=60).filter(
    lambda labels: all(labels.count(label) >= 2 for label in labels)
)


@given(label_lists, st.integers(2, 10), st.integers(0, 2**40))
def test_each_label_is_spread_evenly_and_left_in_every_training_part(labels: list[int], folds: int, seed: int) -> None:
    given = np.array(labels)
    assigned = stratified_folds(given, folds, seed)
    assert assigned is not None
    assert assigned.shape == given.shape
    used = min(folds, len(labels))
    sizes = np.bincount(assigned, minlength=used)
    assert len(sizes) == used
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1
    for label in set(labels):
        counts = np.bincount(assigned[given == label], minlength=used)
        assert counts.max() - counts.min() <= 1
    for fold in range(used):
        assert set(given[assigned != fold].tolist()) == set(labels)


@given(label_lists, st.integers(2, 5), st.integers(0, 1000))
def test_the_same_seed_gives_the_same_folds(labels: list[int], folds: int, seed: int) -> None:
    one, other = (stratified_folds(np.array(labels), folds, seed) for _ in range(2))
    assert one is not None
    assert other is not None
    assert one.tolist() == other.tolist()


def test_another_seed_gives_other_folds() -> None:
    labels = np.arange(40) % 2
    assert len({tuple(stratified_folds(labels, 4, seed)) for seed in range(5)}) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "folds"), [([0, 0, 1], 2), ([0, 0, 1, 1], 1), ([0, 0, 1, 1], 0), ([], 3), ([0], 3), ([2, 2, 0], 2)]
)
def test_where_no_honest_estimate_can_be_had_there_are_no_folds(labels: list[int], folds: int) -> None:
    assert stratified_folds(np.array(labels, dtype=np.int64), folds, 0) is None


def test_a_label_that_does_not_occur_stops_nothing() -> None:
    assert stratified_folds(np.array([0, 0, 3, 3]), 2, 0) is not None
