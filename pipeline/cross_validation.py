"""Out-of-fold scores on the labelled rows: the only honest judgement of an annotator before a test."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def stratified_folds(labels: Ints, folds: int, seed: int) -> Ints | None:
    """The fold of each row, each label spread evenly over the folds.

    Args:
        labels: int64 ``[rows]``.
        folds: how many.
        seed: for the order within a label.

    Returns:
        int64 ``[rows]``, or None where no honest estimate can be had: a label that occurs has one row alone, or
        there are fewer than two folds.
    """
    folds = min(folds, len(labels))
    counts = np.bincount(labels) if len(labels) else np.zeros(0, dtype=np.int64)
    if folds < 2 or (counts == 1).any():
        return None
    random = np.random.default_rng(seed)
    assigned = np.zeros(len(labels), dtype=np.int64)
    turn = 0
    for label in np.flatnonzero(counts):
        rows = random.permutation(np.flatnonzero(labels == label))
        assigned[rows] = (turn + np.arange(len(rows))) % folds
        turn += len(rows)
    return assigned
