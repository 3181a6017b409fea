"""Fitting one annotator: trained on all labelled rows, and judged on those that parts of its training did not see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.annotators import Annotator, Labelled, Texts, method
from pipeline.base_model import BaseModel
from pipeline.cross_validation import stratified_folds
from pipeline.progress import Progress, part_of
from pipeline.tables import Floats
from pipeline.training import Diverged, seed_of


@dataclass(frozen=True)
class Fitted:
    """An annotator and what cross-validation says of it.

    Attributes:
        annotator: trained on all rows.
        held_out: out-of-fold log-probabilities, float32 ``[rows, labels]``; None where there were no folds.
        accuracy: of these; None where there were none.
        folds: how many.
    """

    annotator: Annotator
    held_out: Floats | None
    accuracy: float | None
    folds: int


def fit_annotator(
    spec: Mapping[str, Any],
    labelled: Labelled,
    transfer: Texts,
    base: BaseModel,
    profile: Mapping[str, str],
    seed: int,
    progress: Progress | None = None,
) -> Fitted:
    """Cross-validate and train.

    Args:
        spec: the method's settings, and ``method``, ``folds``, ``labels`` and ``steps``.
        labelled: the labelled rows.
        transfer: the transfer set's text columns.
        base: where to start from.
        profile: the numeric profile.
        seed: of the training on all rows; the folds' follow from it.
        progress: called with steps done and steps in all, of all trainings together.

    Raises:
        Diverged: a training did, or held-out scores are no numbers.
    """
    train = method(spec["method"]).train
    # All annotators share the folds, so that their out-of-fold scores can be blended too.
    folds = stratified_folds(labelled.labels, spec["folds"], seed_of("folds")) if spec["steps"] else None
    rounds = 1 + (0 if folds is None else int(folds.max()) + 1)
    steps = max(spec["steps"], 1) if len(labelled) else 1

    def part(number: int) -> Progress | None:
        if progress is None:
            return None
        return part_of(progress, number * steps, steps, rounds * steps)

    held_out, accuracy, one = None, None, None
    if folds is not None:
        held_out = np.zeros((len(labelled), len(spec["labels"])), dtype=np.float32)
        for number in range(rounds - 1):
            held = np.flatnonzero(folds == number)
            rest = labelled.take(np.flatnonzero(folds != number))
            one = train(spec, rest, transfer, base, profile, seed_of(seed, "fold", number), part(number), one)
            held_out[held] = one.log_probabilities(labelled.take(held).texts)
        strange = int((~np.isfinite(held_out)).any(axis=1).sum())
        if strange:
            raise Diverged(f"its held-out scores of {strange} of {len(labelled)} labelled rows are no numbers")
        accuracy = round(float((held_out.argmax(axis=1) == labelled.labels).mean()), 6)
    annotator = train(spec, labelled, transfer, base, profile, seed, part(rounds - 1), one)
    if progress:
        progress(rounds * steps, rounds * steps)
    return Fitted(annotator, held_out, accuracy, rounds - 1)
