"""Fine-tuning: the base model with a classification head, on the labelled rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.annotators import Annotator, Labelled, Texts
from pipeline.base_model import BaseModel
from pipeline.progress import Progress
from pipeline.student import Student, distill


def train(
    spec: Mapping[str, Any],
    labelled: Labelled,
    transfer: Texts,
    base: BaseModel,
    profile: Mapping[str, str],
    seed: int,
    progress: Progress | None = None,
    before: Annotator | None = None,
) -> Student:
    """Fine-tune; `spec` is that of `pipeline.student.distill`, and neither `transfer` nor `before` is used."""
    return distill({**spec, "temperature": 1.0}, None, {}, labelled, base, profile, seed, progress)


def load(path: Path, base: BaseModel, profile: Mapping[str, str]) -> Student:
    """Read a fine-tuned classifier."""
    return Student.load(path, profile)
