"""iPET: who teaches whom, how many rows a generation draws, and which."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.ipet import draw_rows, quotas, select_rows, selection_seed, teachers


@st.composite
def pools(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Soft labels of some rows, in which the last label may never be predicted, and counts of labelled rows."""
    labels = draw(st.integers(2, 5))
    logits = draw(hnp.arrays(np.float64, st.tuples(st.integers(1, 60), st.just(labels)), elements=st.floats(-30, 30)))
    if draw(st.booleans()):
        logits[:, -1] = -60
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    counts = draw(st.lists(st.integers(0, 6), min_size=labels, max_size=labels))
    return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32), np.array(counts)


def distributions(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


# ---- teachers ------------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.floats(0, 1), st.integers(0, 1000))
def test_teachers_are_others_and_never_none(members: int, share: float, seed: int) -> None:
    for member in range(members):
        chosen = teachers(member, members, share, seed)
        assert member not in chosen
        assert len(chosen) == len(set(chosen)) == max(1, round(share * (members - 1)))
        assert set(chosen) <= set(range(members))
        assert chosen == teachers(member, members, share, seed)


def test_an_annotator_that_is_alone_teaches_itself() -> None:
    assert teachers(0, 1, 0.25, seed=0) == [0]


def test_three_annotators_and_a_quarter_of_two_others_is_one_teacher() -> None:
    assert len(teachers(0, 3, 0.25, seed=0)) == 1  # the published code draws none


def test_teachers_and_seeds_differ_by_generation_and_annotator() -> None:
    seeds = {selection_seed(*of) for of in (("a", 0, 1), ("a", 0, 2), ("a", 1, 1), ("b", 0, 1))}
    assert len(seeds) == 4
    assert len({tuple(teachers(0, 9, 0.25, seed)) for seed in range(20)}) > 5


# ---- quotas --------------------------------------------------------------------------------------------


def test_labelled_and_drawn_rows_together_grow_by_the_factor() -> None:
    counts = np.array([6, 2])
    assert (counts + quotas(counts, 10_000, 1, growth=5)).tolist() == [30, 10]
    assert (counts + quotas(counts, 10_000, 2, growth=5)).tolist() == [150, 50]
    assert (counts + quotas(counts, 10_000, 2, growth=3)).tolist() == [54, 18]


@pytest.mark.parametrize(("generation", "each"), [(1, 5), (2, 25), (3, 125)])
def test_without_labelled_rows_the_first_generation_draws_ten_in_all(generation: int, each: int) -> None:
    assert quotas(np.zeros(2, dtype=np.int64), 10_000, generation, growth=5).tolist() == [each, each]


def test_many_labels_without_rows_draw_one_each() -> None:
    assert quotas(np.zeros(40, dtype=np.int64), 10_000, 1, growth=5).tolist() == [1] * 40


def test_a_label_without_a_labelled_row_is_drawn_as_if_it_had_one() -> None:
    assert quotas(np.array([4, 0]), 10_000, 1, growth=5).tolist() == [16, 5]


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6), st.integers(1, 300), st.integers(1, 10), st.floats(1.5, 9))
def test_quotas_fit_into_the_rows_in_the_ratio_of_the_labels(
    given: list[int], rows: int, generation: int, growth: float
) -> None:
    counts = np.array(given)
    free, found = quotas(counts, 2**62, generation, growth), quotas(counts, rows, generation, growth)
    assert (found >= 0).all()
    assert found.sum() == min(rows, free.sum())
    assert found == pytest.approx(free * min(1, rows / free.sum()), abs=1)


# ---- rows ----------------------------------------------------------------------------------------------


@given(pools(), st.integers(1, 3), st.floats(1.5, 6), st.integers(0, 99))
def test_quotas_are_met_or_all_rows_used_whatever_was_predicted(
    pool: tuple[np.ndarray, np.ndarray], generation: int, growth: float, seed: int
) -> None:
    probabilities, counts = pool
    found = select_rows(probabilities, counts, generation, growth, seed)
    # One label a row: no row can be drawn twice.
    assert found.labels.shape == (len(probabilities),)
    drawn = np.bincount(found.labels[found.labels >= 0], minlength=len(counts))
    assert drawn.tolist() == quotas(counts, len(probabilities), generation, growth).tolist()
    assert (found.filled <= drawn).all()
    again = select_rows(probabilities, counts, generation, growth, seed)
    assert again.labels.tolist() == found.labels.tolist()
    assert again.filled.tolist() == found.filled.tolist()


@given(pools(), st.integers(0, 99))
def test_more_rows_wanted_than_there_are_takes_them_all(pool: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    probabilities, counts = pool
    found = draw_rows(probabilities, np.full(len(counts), len(probabilities)), seed)
    assert (found.labels >= 0).all()


def test_rows_are_drawn_from_those_predicted_as_the_label() -> None:
    soft = distributions(*[[0.9, 0.1]] * 20, *[[0.2, 0.8]] * 20)
    found = draw_rows(soft, np.array([5, 5]), seed=0)
    assert np.bincount(found.labels[:20] + 1).tolist() == [15, 5]
    assert np.bincount(found.labels[20:] + 1).tolist() == [15, 0, 5]
    assert found.filled.tolist() == [0, 0]


def test_a_label_that_is_never_predicted_gets_the_rows_most_probable_for_it() -> None:
    soft = distributions([0.9, 0.1], [0.6, 0.4], [0.99, 0.01], [0.55, 0.45], [0.98, 0.02], [0.97, 0.03])
    found = draw_rows(soft, np.array([0, 2]), seed=0)
    assert found.labels.tolist() == [-1, 1, -1, 1, -1, -1]
    assert found.filled.tolist() == [0, 2]


def test_rows_are_drawn_in_proportion_to_their_probability() -> None:
    soft = distributions([0.9, 0.05, 0.05], [0.45, 0.3, 0.25])
    first = sum(draw_rows(soft, np.array([1, 0, 0]), seed).labels[0] == 0 for seed in range(2000))
    assert first / 2000 == pytest.approx(2 / 3, abs=0.04)


def test_only_the_highest_scoring_rows_count_where_told() -> None:
    soft = distributions(*[[0.5 + i / 100, 0.5 - i / 100] for i in range(40)])
    for seed in range(5):
        found = draw_rows(soft, np.array([3, 3]), seed, among=10)
        assert set(np.flatnonzero(found.labels == 0)) <= set(range(30, 40))
        assert set(np.flatnonzero(found.labels == 1)) <= set(range(10))
        assert found.filled.tolist() == [0, 0]


def test_the_first_generation_without_labelled_rows_draws_among_the_hundred_highest() -> None:
    soft = distributions(*[[0.5 + i / 1000, 0.5 - i / 1000] for i in range(400)])
    nothing = np.zeros(2, dtype=np.int64)
    first, second = (select_rows(soft, nothing, generation, 5, seed=0) for generation in (1, 2))
    assert np.flatnonzero(first.labels == 0).min() >= 300
    assert np.flatnonzero(first.labels == 1).max() < 100
    assert np.flatnonzero(second.labels == 0).min() < 300


def test_another_seed_draws_other_rows() -> None:
    soft = distributions(*[[0.9, 0.1]] * 50)
    one, other = (draw_rows(soft, np.array([10, 0]), seed).labels.tolist() for seed in (0, 1))
    assert one != other
