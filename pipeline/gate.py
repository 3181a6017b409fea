"""The publish gate: whether a new version looks worse than the one in force.

It looks at what both versions say of themselves and at nothing else, so that the same two versions and the same
limits always give the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.task import Gate


@dataclass(frozen=True)
class Measures:
    """What the gate compares.

    Attributes:
        labels: the task's labels, in order.
        rows: the rows of all splits.
        label_counts: how many rows the student gave each label.
        cross_validated: accuracy of the weighted ensemble and the rows it was measured on; None without folds.
    """

    labels: tuple[str, ...]
    rows: int
    label_counts: Mapping[str, int]
    cross_validated: tuple[float, int] | None

    @classmethod
    def of(cls, manifest: Mapping[str, Any], metrics: Mapping[str, Any]) -> Measures:
        """From the contents of a version's ``manifest.json`` and ``metrics.json``.

        Raises:
            KeyError: they are not those of a version.
        """
        weighted = (metrics["cross_validation"] or {}).get("weighted")
        return cls(
            tuple(manifest["labels"]),
            sum(manifest["rows"].values()),
            metrics["summary"]["label_counts"],
            None if weighted is None else (weighted["accuracy"], weighted["rows"]),
        )


def reasons_to_hold(new: Measures, old: Measures, limits: Gate) -> list[str]:
    """Why a new version looks worse than the one in force.

    Args:
        new: the new version.
        old: the version in force.
        limits: the task's.

    Returns:
        One sentence a reason; none where it may be put in force. With other labels, or another order of them, it
        is another task, and the two are not compared.
    """
    if not limits.enabled or new.labels != old.labels:
        return []
    found = [
        _accuracy(new, old, limits.cv_drop),
        _shares(new, old, limits.share_shift),
        *_gone(new, old),
        _rows(new, old, limits.min_rows),
    ]
    return [reason for reason in found if reason is not None]


def _accuracy(new: Measures, old: Measures, limit: float) -> str | None:
    if new.cross_validated is None or old.cross_validated is None:
        return None
    (after, rows_after), (before, rows_before) = new.cross_validated, old.cross_validated
    if not rows_after or not rows_before:
        return None
    # With 40 labelled rows five points are two rows, which is noise: one of two equal models would be held every few
    # nights. A drop counts where it is beyond chance as well.
    chance = math.sqrt(after * (1 - after) / rows_after + before * (1 - before) / rows_before)
    drop = round(before - after, 6)
    if drop <= limit or drop <= 2 * chance:
        return None
    return (
        f"cross-validated accuracy fell from {_percent(before)} ({rows_before} rows) to {_percent(after)} "
        f"({rows_after} rows), by more than {_percent(limit)}"
    )


def _shares(new: Measures, old: Measures, limit: float) -> str | None:
    after, before = (sum(measures.label_counts.values()) for measures in (new, old))
    if not after or not before:
        return None
    # Total variation: the least share of rows that must change their labels to come from one to the other.
    moves = {name: new.label_counts[name] / after - old.label_counts[name] / before for name in new.labels}
    shift = round(sum(abs(move) for move in moves.values()) / 2, 6)
    if shift <= limit:
        return None
    most = max(moves, key=lambda name: abs(moves[name]))
    return (
        f"label shares shifted by {_percent(shift)}, by more than {_percent(limit)}; most of all {most!r}, from "
        f"{_percent(old.label_counts[most] / before)} to {_percent(new.label_counts[most] / after)}"
    )


def _gone(new: Measures, old: Measures) -> list[str]:
    return [
        f"no row has the label {name!r} any more; {old.label_counts[name]:,} rows had it"
        for name in new.labels
        if old.label_counts[name] and not new.label_counts[name]
    ]


def _rows(new: Measures, old: Measures, limit: float) -> str | None:
    if new.rows >= limit * old.rows:
        return None
    return f"{new.rows:,} rows are fewer than {limit:g} times the {old.rows:,} rows of the version in force"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
