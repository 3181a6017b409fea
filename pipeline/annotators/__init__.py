"""Annotators: every method that scores rows stands behind one interface.

A method is a module with two functions::

    train(spec, labelled, transfer, base, profile, seed, progress, before) -> Annotator
    load(path, base, profile) -> Annotator

and an `Annotator` gives log-probabilities ``[rows, labels]`` and saves itself into a directory. `spec` is a
JSON mapping, so that it can be part of a content key.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from pipeline.base_model import BaseModel
from pipeline.progress import Progress
from pipeline.tables import Floats

Texts = Mapping[str, Sequence[str]]
METHODS = {
    "pet": "pipeline.annotators.pet",
    "fine-tune": "pipeline.annotators.fine_tune",
    "embedding": "pipeline.annotators.embedding",
    "tfidf-nb": "pipeline.annotators.tfidf_nb",
}


@dataclass(frozen=True)
class Labelled:
    """Labelled rows: the text columns and int64 ``[rows]`` label numbers."""

    texts: dict[str, list[str]]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: npt.NDArray[np.int64]) -> Labelled:
        """Some of the rows."""
        texts = {name: [column[i] for i in rows] for name, column in self.texts.items()}
        return Labelled(texts, self.labels[rows])

    def joined(self, other: Labelled) -> Labelled:
        """These rows, then another's; one without rows may lack the text columns."""
        if not len(self) or not len(other):
            return self if len(self) else other
        texts = {name: [*column, *other.texts[name]] for name, column in self.texts.items()}
        return Labelled(texts, np.concatenate([self.labels, other.labels]))

    def counts(self, labels: int) -> npt.NDArray[np.int64]:
        """How many rows each of so many labels has, int64 ``[labels]``."""
        return np.bincount(self.labels, minlength=labels)


class Annotator(Protocol):
    """A trained scorer."""

    def log_probabilities(self, texts: Texts, progress: Progress | None = None) -> Floats:
        """Log-probabilities of the labels, float32 ``[rows, labels]``."""
        ...

    def save(self, path: Path) -> None:
        """Write itself into an existing directory."""
        ...


class Method(Protocol):
    """A module that trains and loads annotators."""

    def train(
        self,
        spec: Mapping[str, Any],
        labelled: Labelled,
        transfer: Texts,
        base: BaseModel,
        profile: Mapping[str, str],
        seed: int,
        progress: Progress | None = None,
        before: Annotator | None = None,
    ) -> Annotator:
        """Train on labelled rows.

        `transfer` is unlabelled text for whoever can use it. `before` is an annotator that was trained with the same
        spec, transfer, base and profile and is used up by this: whoever can begin anew with it need not load a model
        again, and may return it. The result is the same.
        """
        ...

    def load(self, path: Path, base: BaseModel, profile: Mapping[str, str]) -> Annotator:
        """Read what `Annotator.save` wrote."""
        ...


def method(name: str) -> Method:
    """The module of a method, imported when it is first wanted."""
    return cast(Method, importlib.import_module(METHODS[name]))
