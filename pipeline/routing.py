"""Which rows people should look at first."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from pipeline.ragged import Numbers
from pipeline.tables import Floats

# A release's vocabulary; what gives "auto" and "audit" is to come, and a name added then would change the schema.
ROUTES = ["review", "auto", "audit", "train", "rest"]
# The student's margin picks this many times the budget; the annotators then score just those, and margin and
# disagreement together pick the budget's rows among them.
CANDIDATES_PER_ROW = 2


def lowest(parts: Iterable[Floats], count: int) -> tuple[Numbers, Floats]:
    """The rows with the lowest margin, lowest first; ties in row order.

    Args:
        parts: margins, batch by batch; an infinite one is never chosen.
        count: how many at most.

    Returns:
        Row numbers over all parts, int64 ``[count]``, and their margins, float32 ``[count]``.
    """
    rows, margins, start = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32), 0
    for part in parts:
        limit = margins[-1] if len(margins) == count > 0 else np.inf
        at = np.flatnonzero(part < limit)
        rows = np.concatenate([rows, at + start])
        margins = np.concatenate([margins, part[at]])
        order = np.argsort(margins, kind="stable")[:count]  # earlier rows stand before later ones already
        rows, margins = rows[order], margins[order]
        start += len(part)
    return rows, margins


def priorities(margins: Floats, disagreements: Floats) -> Floats:
    """The urgency of each row, in 0..1, higher first: the mean of its ranks by margin and by disagreement.

    Args:
        margins: float32 ``[rows]``, the student's.
        disagreements: float32 ``[rows]``, the annotators'.

    Ranks, since the two have different scales and a student's margin says nothing of the annotators'.

    Returns:
        float32 ``[rows]``.
    """
    if len(margins) <= 1:
        return np.ones(len(margins), dtype=np.float32)
    ranks = _ranks(-margins) + _ranks(disagreements)
    return np.asarray(ranks / (2 * (len(margins) - 1)), dtype=np.float32)


def _ranks(values: Floats) -> npt.NDArray[np.float64]:
    """Ranks from 0, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray(((ends - counts + ends - 1) / 2)[inverse])


def reasons(margin: float, disagreement: float, margin_median: float, disagreement_median: float) -> list[str]:
    """Why a row is in the queue: what puts it above the queue's median."""
    found = []
    if margin <= margin_median:
        found.append("low_margin")
    if disagreement > disagreement_median:
        found.append("annotators_disagree")
    return found or ["budget"]
