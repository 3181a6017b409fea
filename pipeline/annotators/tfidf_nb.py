"""tf-idf features with complement Naive Bayes (Rennie et al. 2003): the baseline of the first paradigm.

Saved as the labelled rows it was fitted on, since fitting takes milliseconds and pickles are not kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.naive_bayes import ComplementNB
from sklearn.pipeline import make_pipeline

from pipeline.annotators import Annotator, Labelled, Texts
from pipeline.base_model import BaseModel
from pipeline.progress import Progress
from pipeline.tables import Floats
from pipeline.template import Template


class TfidfNaiveBayes:
    """Word and bigram tf-idf with complement Naive Bayes."""

    def __init__(self, spec: Mapping[str, Any], labelled: Labelled) -> None:
        self.spec, self.labelled = dict(spec), labelled
        self.template = Template.parse(spec["template"])
        self.pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), ComplementNB())
        self.pipeline.fit(self.template.render_rows(labelled.texts), labelled.labels)

    def log_probabilities(self, texts: Texts, progress: Progress | None = None) -> Floats:
        """Log-probabilities, float32 ``[rows, labels]``; a label without a row gets a floor."""
        result = np.full((len(next(iter(texts.values()))), len(self.spec["labels"])), -20.0, dtype=np.float32)
        result[:, self.pipeline.classes_] = self.pipeline.predict_log_proba(self.template.render_rows(texts))
        return result

    def save(self, path: Path) -> None:
        """Write the rows that it is fitted on."""
        fitted = {"spec": self.spec, "texts": self.labelled.texts, "labels": self.labelled.labels.tolist()}
        (path / "rows.json").write_text(json.dumps(fitted), encoding="utf-8")


def train(
    spec: Mapping[str, Any],
    labelled: Labelled,
    transfer: Texts,
    base: BaseModel,
    profile: Mapping[str, str],
    seed: int,
    progress: Progress | None = None,
    before: Annotator | None = None,
) -> TfidfNaiveBayes:
    """Fit; `spec` holds labels and template, the rest is not used."""
    return TfidfNaiveBayes(spec, labelled)


def load(path: Path, base: BaseModel, profile: Mapping[str, str]) -> TfidfNaiveBayes:
    """Fit again on the saved rows."""
    saved = json.loads((path / "rows.json").read_text(encoding="utf-8"))
    labelled = Labelled(saved["texts"], np.asarray(saved["labels"], dtype=np.int64))
    return TfidfNaiveBayes(saved["spec"], labelled)
