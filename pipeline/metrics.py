"""Accuracy with its interval, and what stands beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# What a test file compares, in the order in which it is shown.
METHODS = ("best annotator", "majority", "uniform", "weighted", "student", "oracle annotator")
Ints = npt.NDArray[np.int64]


def wilson_interval(correct: int, rows: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion, by default at 95 %.

    >>> [round(bound, 3) for bound in wilson_interval(90, 100)]
    [0.826, 0.945]
    """
    if rows == 0:
        return 0.0, 1.0
    share, square = correct / rows, z * z
    centre = (share + square / (2 * rows)) / (1 + square / rows)
    half = z / (1 + square / rows) * math.sqrt(share * (1 - share) / rows + square / (4 * rows * rows))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def classification_metrics(predicted: Ints, truth: Ints, labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy with a 95 % interval, macro-F1, and precision, recall and F1 a label.

    Args:
        predicted: int64 ``[rows]``.
        truth: int64 ``[rows]``.
        labels: the names behind the numbers.

    Macro-F1 is over the labels that occur in the truth.
    """
    correct = int((predicted == truth).sum())
    low, high = wilson_interval(correct, len(truth))
    numbers = range(len(labels))
    given, support, hits = (
        np.bincount(part, minlength=len(labels)) for part in (predicted, truth, truth[predicted == truth])
    )
    # A label that is never given, or never true, has nought for what can't be told of it.
    precision, recall = hits / np.maximum(given, 1), hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(given + support, 1)
    present = [i for i in numbers if support[i] > 0]
    return {
        "rows": len(truth),
        "accuracy": round(correct / max(len(truth), 1), 6),
        "accuracy_low": round(low, 6),
        "accuracy_high": round(high, 6),
        "macro_f1": round(float(np.mean([f1[i] for i in present])) if present else 0.0, 6),
        "per_label": {
            labels[i]: {
                "precision": round(float(precision[i]), 6),
                "recall": round(float(recall[i]), 6),
                "f1": round(float(f1[i]), 6),
                "rows": int(support[i]),
            }
            for i in numbers
        },
    }
