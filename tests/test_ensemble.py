"""Blending: weights, soft labels, votes, disagreement."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.ensemble import blend, disagreement, majority, margin, match_prior, shrunk_weights

accuracies = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)


@st.composite
def ensembles(draw: st.DrawFn, annotators: int | None = None) -> tuple[list[np.ndarray], np.ndarray]:
    """Log-probabilities of some annotators, from uniform to certain, and their weights."""
    count = annotators or draw(st.integers(1, 5))
    shape = (count, draw(st.integers(1, 6)), draw(st.integers(2, 5)))
    logits = draw(hnp.arrays(np.float64, shape, elements=st.floats(-80, 80)))
    weights = np.array(draw(st.lists(st.floats(0.01, 1), min_size=count, max_size=count)))
    return list(log_softmax(logits)), weights / weights.sum()


# ---- weights -------------------------------------------------------------------------------------------


@given(accuracies, st.integers(0, 10_000))
def test_weights_sum_to_one_and_keep_the_order_of_the_accuracies(given: list[float], rows: int) -> None:
    weights = shrunk_weights(given, rows)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert (np.diff(weights[np.argsort(given, kind="stable")]) >= -1e-12).all()


@given(accuracies.filter(lambda values: sum(values) > 0.01), st.integers(1, 500))
def test_more_rows_move_weights_away_from_uniform(given: list[float], rows: int) -> None:
    uniform = 1 / len(given)
    few, many = (np.abs(shrunk_weights(given, n) - uniform).max() for n in (rows, 2 * rows))
    assert few <= many + 1e-12
    assert shrunk_weights(given, 0) == pytest.approx([uniform] * len(given))
    assert shrunk_weights(given, 10**9) == pytest.approx(np.array(given) / sum(given), abs=1e-4)


@pytest.mark.parametrize("given", [[0.9, None, 0.5], [None, None], [0.0, 0.0, 0.0]])
def test_weights_are_uniform_where_accuracies_say_nothing(given: list[float | None]) -> None:
    assert shrunk_weights(given, 100).tolist() == pytest.approx([1 / len(given)] * len(given))


def test_the_formula_is_that_of_the_documentation() -> None:
    # n = 50, m = 50: (50 * 0.9 + 50 * 0.7) / 100 = 0.8 and 0.6, normalised.
    assert shrunk_weights([0.9, 0.5], rows=50) == pytest.approx([0.8 / 1.4, 0.6 / 1.4])


# ---- blending ------------------------------------------------------------------------------------------


@given(ensembles())
def test_soft_labels_are_distributions_within_what_the_annotators_say(
    ensemble: tuple[list[np.ndarray], np.ndarray],
) -> None:
    parts, weights = ensemble
    soft = blend(parts, weights)
    assert soft.dtype == np.float32
    assert soft.sum(axis=1) == pytest.approx(np.ones(len(soft)), abs=1e-5)
    each = np.exp(np.stack(parts))
    assert (soft >= each.min(axis=0) - 1e-5).all()
    assert (soft <= each.max(axis=0) + 1e-5).all()


@given(ensembles(annotators=1), st.integers(2, 4))
def test_annotators_of_one_mind_blend_to_what_each_says(
    ensemble: tuple[list[np.ndarray], np.ndarray], copies: int
) -> None:
    (part,), _ = ensemble
    weights = np.full(copies, 1 / copies)
    assert blend([part] * copies, weights) == pytest.approx(np.exp(part), abs=1e-5)
    assert disagreement([part] * copies, weights) == pytest.approx(np.zeros(len(part)), abs=1e-5)


def test_an_annotator_counts_by_its_weight() -> None:
    parts = [np.log(np.array([[0.9, 0.1]], np.float32)), np.log(np.array([[0.1, 0.9]], np.float32))]
    assert blend(parts, np.array([0.75, 0.25]))[0] == pytest.approx([0.7, 0.3], abs=1e-6)


# ---- disagreement --------------------------------------------------------------------------------------


@given(ensembles())
def test_disagreement_lies_between_nought_and_one(ensemble: tuple[list[np.ndarray], np.ndarray]) -> None:
    parts, weights = ensemble
    found = disagreement(parts, weights)
    assert found.shape == (len(parts[0]),)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert ((found >= 0) & (found <= 1)).all()


def test_a_single_annotator_never_disagrees() -> None:
    assert disagreement([log_softmax(np.array([[3.0, 1.0], [0.0, 0.0]]))], np.ones(1)).tolist() == [0, 0]


@pytest.mark.parametrize(("annotators", "labels"), [(2, 2), (3, 3), (2, 4), (4, 2)])
def test_annotators_who_are_certain_of_different_labels_disagree_fully(annotators: int, labels: int) -> None:
    certain = [log_softmax(80 * np.eye(labels)[[i % labels]]) for i in range(annotators)]
    assert disagreement(certain, np.full(annotators, 1 / annotators)) == pytest.approx([1], abs=1e-5)


def test_disagreement_grows_as_annotators_drift_apart() -> None:
    apart = [
        disagreement([log_softmax(np.array([[x, 0.0]])), log_softmax(np.array([[0.0, x]]))], np.array([0.5, 0.5]))[0]
        for x in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    ]
    assert apart == sorted(apart)
    assert len(set(apart)) == len(apart)


# ---- votes, priors, margins ----------------------------------------------------------------------------


def test_the_label_with_most_votes_wins_over_the_surer_one() -> None:
    parts = [np.log(np.array([row], np.float32)) for row in ([0.6, 0.4], [0.6, 0.4], [0.01, 0.99])]
    assert blend(parts, np.full(3, 1 / 3)).argmax() == 1
    assert majority(parts).tolist() == [0]


def test_a_tied_vote_goes_to_the_more_probable_label() -> None:
    parts = [np.log(np.array([row], np.float32)) for row in ([0.6, 0.3, 0.1], [0.2, 0.7, 0.1])]
    assert majority(parts).tolist() == [1]


@given(ensembles())
def test_a_majority_is_never_outvoted(ensemble: tuple[list[np.ndarray], np.ndarray]) -> None:
    parts, _ = ensemble
    votes = np.stack([part.argmax(axis=1) for part in parts])
    for chosen, cast in zip(majority(parts), votes.T, strict=True):
        counts = np.bincount(cast, minlength=parts[0].shape[1])
        assert counts[chosen] == counts.max()


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 30), st.just(3)), elements=st.floats(-4, 4)),
    st.lists(st.floats(0.1, 1), min_size=3, max_size=3),
)
def test_matching_a_prior_gives_distributions_with_that_mean(logits: np.ndarray, target: list[float]) -> None:
    wanted = np.array(target) / sum(target)
    moved = match_prior(np.exp(log_softmax(logits)), wanted)
    assert moved.sum(axis=1) == pytest.approx(np.ones(len(moved)), abs=1e-5)
    assert moved.mean(axis=0) == pytest.approx(wanted, abs=2e-3)


def test_matching_a_prior_keeps_the_order_of_rows_within_a_label() -> None:
    soft = np.array([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.55, 0.45]], np.float32)
    moved = match_prior(soft, np.array([0.5, 0.5]))
    assert (np.diff(moved[:, 0]) < 0).all()
    assert moved.mean(axis=0) == pytest.approx([0.5, 0.5], abs=1e-3)


def test_matching_a_prior_of_rows_that_are_certain_stays_a_distribution() -> None:
    moved = match_prior(np.array([[1, 0], [1, 0], [1, 0]], np.float32), np.array([0.5, 0.5]))
    assert np.isfinite(moved).all()
    assert moved.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-5)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(2, 5)), elements=st.floats(0, 1, width=32)))
def test_a_margin_is_the_lead_of_the_first_over_the_second(values: np.ndarray) -> None:
    ordered = np.sort(values, axis=1)
    assert margin(values).tolist() == (ordered[:, -1] - ordered[:, -2]).tolist()
