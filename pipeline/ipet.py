"""iPET: later generations of annotators learn from what others of the generation before were sure of.

Schick & Schütze (2021), section 3.4: for each annotator a random part of the others labels the transfer set; rows are
drawn from it, confident ones first, so that labelled and drawn rows together grow by a factor each generation and keep
the labelled rows' shares; the annotator is trained anew on both. Unlike the published code, this ends and starves no
label whatever was predicted: where too few rows are predicted as a label, those most probable for it stand in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.ragged import Numbers
from pipeline.store import key_of
from pipeline.tables import Floats

# The paper's first rows where nothing is labelled: ten in all, each among the 100 that score highest for its label.
UNLABELLED_ROWS, UNLABELLED_AMONG = 10, 100


@dataclass(frozen=True)
class Selection:
    """What was drawn.

    Attributes:
        labels: int64 ``[rows]``, the label for which a row was drawn, -1 where it was not.
        filled: int64 ``[labels]``, how many of a label's rows stand in for rows predicted as it.
    """

    labels: Numbers
    filled: Numbers


def selection_seed(pattern: str, seed: int, generation: int) -> int:
    """The seed of an annotator's draws for a generation."""
    return int(key_of({"ipet": [pattern, seed, generation]})[:12], 16)


def teachers(member: int, members: int, share: float, seed: int) -> list[int]:
    """Who labels the rows that a member of the ensemble learns from.

    Args:
        member: its number.
        members: how many there are.
        share: lambda, the part of the others that is drawn; one at least.
        seed: of the draw.

    Returns:
        Their numbers, ascending; a member that is alone teaches itself.
    """
    others = [other for other in range(members) if other != member]
    if not others:
        return [member]
    count = max(1, round(share * len(others)))
    chosen = np.random.default_rng(seed).choice(len(others), count, replace=False)
    return sorted(others[i] for i in chosen)


def quotas(counts: Numbers, rows: int, generation: int, growth: float) -> Numbers:
    """How many rows of each label to draw: c_j - c_0, where c_j(l) = d * c_(j-1)(l).

    A label without a labelled row counts as one with a single row, or training on the others would unlearn it.

    Args:
        counts: c_0, int64 ``[labels]``, the labelled rows of each label; where all are zero, c_1 is ten rows in all.
        rows: how many there are to draw from.
        generation: j, from one.
        growth: d.

    Returns:
        int64 ``[labels]``, summing to no more than ``rows``, in the same ratio.
    """
    if counts.any():
        wanted = np.rint(np.maximum(counts, 1) * growth**generation) - counts
    else:
        each = UNLABELLED_ROWS / len(counts) * growth ** (generation - 1)
        wanted = np.full(len(counts), max(np.rint(each), 1.0))
    if wanted.sum() <= rows:
        return np.asarray(wanted, dtype=np.int64)
    exact = wanted * (rows / wanted.sum())
    whole: Numbers = np.floor(exact).astype(np.int64)
    largest = np.argsort(whole - exact, kind="stable")  # the largest remainders first
    whole[largest[: rows - int(whole.sum())]] += 1
    return whole


def draw_rows(probabilities: Floats, wanted: Numbers, seed: int, among: int | None = None) -> Selection:
    """Draw rows for each label without replacement, each row for one label at most.

    A label's rows are drawn from those predicted as it, with a chance in proportion to its probability; what is then
    missing is filled with the rows most probable for it among all that are left, as moving the predictions to the
    wanted shares would.

    Args:
        probabilities: float32 ``[rows, labels]``.
        wanted: int64 ``[labels]``, how many rows of each.
        seed: of the draw.
        among: count for a label only the rows that score highest for it, so many, whatever else they may be.

    Returns:
        The selection: as many rows as wanted, or all there are.
    """
    random = np.random.default_rng(seed)
    owner = _owners(probabilities, among)
    labels = np.full(len(probabilities), -1, dtype=np.int64)
    filled = np.zeros(len(wanted), dtype=np.int64)
    for label, quota in enumerate(wanted):
        mine = np.flatnonzero(owner == label)
        # The smallest of exponential variables at these rates are a draw without replacement (Efraimidis & Spirakis
        # 2006), which minds no probability of nought.
        turns = random.exponential(size=len(mine)) / np.maximum(probabilities[mine, label], 1e-12)
        labels[mine[np.argsort(turns, kind="stable")[:quota]]] = label
    for label, quota in enumerate(wanted):
        left = np.flatnonzero(labels < 0)
        best = np.argsort(-probabilities[left, label], kind="stable")
        chosen = left[best[: quota - int((labels == label).sum())]]
        labels[chosen] = label
        filled[label] = len(chosen)
    return Selection(labels, filled)


def _owners(probabilities: Floats, among: int | None) -> Numbers:
    """The most probable label of each row, of those that it scores high enough for; -1 where there is none."""
    if among is None:
        return np.asarray(probabilities.argmax(axis=1), dtype=np.int64)
    ranks = np.argsort(np.argsort(-probabilities, axis=0, kind="stable"), axis=0)
    high = np.where(ranks < among, probabilities, np.float32(-1))
    return np.where(high.max(axis=1) < 0, -1, high.argmax(axis=1))


def select_rows(probabilities: Floats, counts: Numbers, generation: int, growth: float, seed: int) -> Selection:
    """Draw what an annotator's next generation learns from, beside the labelled rows.

    Args:
        probabilities: float32 ``[rows, labels]``, its teachers' soft labels of the transfer set.
        counts: int64 ``[labels]``, the labelled rows of each label.
        generation: that is to be trained, from one.
        growth: the factor by which labelled and drawn rows grow each generation.
        seed: see `selection_seed`.
    """
    wanted = quotas(counts, len(probabilities), generation, growth)
    among = UNLABELLED_AMONG if generation == 1 and not counts.any() else None
    return draw_rows(probabilities, wanted, seed, among)
