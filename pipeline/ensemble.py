"""Blending annotators into soft labels.

Every annotator gives log-probabilities, whose scales differ less than raw logits' do; their probabilities are
averaged with weights. Soft labels are kept at temperature 1: the distillation loss alone has a temperature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.tables import Floats

SHRINKAGE = 50.0
Doubles = npt.NDArray[np.float64]


def shrunk_weights(accuracies: Sequence[float | None], rows: int) -> Doubles:
    """Weights from cross-validated accuracies, shrunk to uniform: w = (n * acc + m * mean) / (n + m).

    With a handful of rows an accuracy has a standard error of ten points and more, so the mean pulls with the
    weight of m (`SHRINKAGE`) rows.

    Args:
        accuracies: one an annotator; None where there was no cross-validation.
        rows: n, the labelled rows behind them.

    Returns:
        float64 ``[annotators]``, summing to one; uniform if any accuracy is missing or all are zero.

    >>> shrunk_weights([0.9, 0.5], rows=50).round(3).tolist()
    [0.571, 0.429]
    """
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    if len(known) < len(accuracies) or sum(known) == 0:
        return np.full(len(accuracies), 1 / len(accuracies))
    values = np.asarray(known, dtype=np.float64)
    weights = (rows * values + SHRINKAGE * values.mean()) / (rows + SHRINKAGE)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def blend(log_probabilities: Sequence[Floats], weights: Doubles) -> Floats:
    """The weighted mean of the annotators' probabilities.

    Args:
        log_probabilities: float32 ``[rows, labels]`` of each annotator.
        weights: ``[annotators]``, summing to one.

    Returns:
        float32 ``[rows, labels]``, each row summing to one.
    """
    total = np.zeros(log_probabilities[0].shape, dtype=np.float64)
    for part, weight in zip(log_probabilities, weights, strict=True):
        total += weight * np.exp(part.astype(np.float64))
    return np.asarray(total / total.sum(axis=1, keepdims=True), dtype=np.float32)


def soft_labels(
    log_probabilities: Sequence[Floats],
    accuracies: Sequence[float | None],
    counts: npt.NDArray[np.int64],
    settings: Mapping[str, str],
) -> tuple[Floats, Doubles]:
    """Weigh annotators and blend them.

    Args:
        log_probabilities: float32 ``[rows, labels]`` of each annotator.
        accuracies: cross-validated, one an annotator; None where there was no cross-validation.
        counts: int64 ``[labels]``, the labelled rows of each label.
        settings: the task's section ``ensemble``.

    Returns:
        float32 ``[rows, labels]``, each row summing to one, and the weights.
    """
    if settings["weights"] == "uniform":
        weights = np.full(len(accuracies), 1 / len(accuracies))
    else:
        weights = shrunk_weights(accuracies, int(counts.sum()))
    soft = blend(log_probabilities, weights)
    if settings["prior"] == "labelled" and counts.any():
        soft = match_prior(soft, smoothed_shares(counts))
    return soft, weights


def majority(log_probabilities: Sequence[Floats]) -> npt.NDArray[np.int64]:
    """The label with most votes; a tie goes to the more probable label.

    Args:
        log_probabilities: float32 ``[rows, labels]`` of each annotator.

    Returns:
        int64 ``[rows]``.
    """
    votes = sum(np.eye(part.shape[1])[part.argmax(axis=1)] for part in log_probabilities)
    uniform = blend(log_probabilities, np.full(len(log_probabilities), 1 / len(log_probabilities)))
    return np.asarray((votes + 0.5 * uniform).argmax(axis=1), dtype=np.int64)


def disagreement(log_probabilities: Sequence[Floats], weights: Doubles) -> Floats:
    """The generalised Jensen-Shannon divergence of the annotators' distributions (Lin 1991).

    JSD = H(sum of w_i p_i) - sum of w_i H(p_i), divided by its upper bound for the number of annotators and
    labels, so that it lies in 0..1. One annotator never disagrees.

    Returns:
        float32 ``[rows]``.
    """
    rows, labels = log_probabilities[0].shape
    bound = np.log(min(len(log_probabilities), labels))
    if bound == 0:
        return np.zeros(rows, dtype=np.float32)
    mean_entropy = np.zeros(rows)
    for part, weight in zip(log_probabilities, weights, strict=True):
        mean_entropy += weight * _entropy(np.exp(part.astype(np.float64)))
    divergence = _entropy(blend(log_probabilities, weights).astype(np.float64)) - mean_entropy
    return np.asarray(np.clip(divergence / bound, 0, 1), dtype=np.float32)


def _entropy(probabilities: Doubles) -> Doubles:
    return np.asarray(-(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=1))


def match_prior(probabilities: Floats, target: Doubles) -> Floats:
    """Move soft labels so that their mean is the target's (distribution alignment, Berthelot et al. 2020).

    Args:
        probabilities: float32 ``[rows, labels]``.
        target: float64 ``[labels]``, summing to one, all positive.

    Returns:
        float32 ``[rows, labels]``, each row summing to one.
    """
    moved = _positive(probabilities) * np.exp(prior_shift(probabilities, target))
    return np.asarray(moved / moved.sum(axis=1, keepdims=True), dtype=np.float32)


def prior_shift(probabilities: Floats, target: Doubles) -> Doubles:
    """What to add to the labels' log-probabilities so that the mean distribution is the target's.

    Columns are scaled and rows normalised in turn (Sinkhorn; Berthelot et al. 2020 do one step of it).

    Args:
        probabilities: float32 ``[rows, labels]``.
        target: float64 ``[labels]``, summing to one, all positive.

    Returns:
        float64 ``[labels]``.
    """
    scale, values = np.ones_like(target), _positive(probabilities)
    for _ in range(100):
        moved = values * scale
        moved /= moved.sum(axis=1, keepdims=True)
        mean = moved.mean(axis=0)
        if np.abs(mean - target).max() < 1e-4:
            break
        scale *= target / np.maximum(mean, 1e-12)
    return np.log(scale)


def smoothed_shares(counts: npt.NDArray[np.int64]) -> Doubles:
    """The labelled rows' shares of the labels, as if there were one row more of each, so that none is zero.

    >>> smoothed_shares(np.array([7, 1])).tolist()
    [0.8, 0.2]
    """
    smoothed = counts.astype(np.float64) + 1.0
    return np.asarray(smoothed / smoothed.sum())


def _positive(probabilities: Floats) -> Doubles:
    """In double precision and above nought, which times any scale stays nought."""
    return np.maximum(probabilities.astype(np.float64), 1e-12)


def margin(probabilities: Floats) -> Floats:
    """The most probable label's lead over the second.

    Args:
        probabilities: float32 ``[rows, labels]``, at least two labels.

    Returns:
        float32 ``[rows]``, in 0..1.
    """
    top = np.partition(probabilities, -2, axis=1)[:, -2:]
    return np.asarray(top[:, 1] - top[:, 0], dtype=np.float32)
