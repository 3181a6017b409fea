"""Mean-pooled embeddings of the base model with logistic regression on top: no fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel

from pipeline.annotators import Annotator, Labelled, Texts
from pipeline.base_model import BaseModel, load_tokenizer
from pipeline.batching import by_length, pad
from pipeline.precision import scoring
from pipeline.progress import Progress
from pipeline.tables import Floats
from pipeline.template import Encoder, Template


class EmbeddingClassifier:
    """Logistic regression over unit-length mean-pooled token vectors."""

    def __init__(self, spec: Mapping[str, Any], base: BaseModel, profile: Mapping[str, str]) -> None:
        self.spec = dict(spec)
        self.device = torch.device(profile["device"])
        self.dtype = getattr(torch, profile["dtype"])
        self.model = AutoModel.from_pretrained(base.path, dtype=torch.float32).to(self.device).eval()
        tokenizer = load_tokenizer(base.path)
        self.pad_id = tokenizer.pad_token_id
        self.encoder = Encoder(tokenizer, min(spec["max_length"], base.positions), spec["truncation"])
        self.template = Template.parse(spec["template"])
        self.weights = np.zeros((len(spec["labels"]), 0), dtype=np.float32)
        self.bias = np.zeros(len(spec["labels"]), dtype=np.float32)

    def embed(self, texts: Texts, progress: Progress | None = None) -> Floats:
        """Unit vectors, float32 ``[rows, width]``."""
        tokens = self.encoder.encode(self.template, texts).tokens
        result = np.zeros((len(tokens), self.model.config.hidden_size), dtype=np.float32)
        done = 0
        with scoring(self.model, self.model, self.dtype):
            for batch in by_length(tokens.lengths, self.device):
                ids, attention = pad(tokens, batch, self.pad_id, self.device)
                hidden = self.model(input_ids=ids, attention_mask=attention).last_hidden_state.float()
                mean = (hidden * attention[..., None]).sum(1) / attention.sum(1, keepdim=True)
                result[batch] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
                done += len(batch)
                if progress:
                    progress(done, len(tokens))
        return result

    def fit(self, labelled: Labelled) -> None:
        """Fit the logistic regression; a label without a row keeps a floor."""
        present = np.unique(labelled.labels)
        vectors = self.embed(labelled.texts)
        self.weights = np.zeros((len(self.spec["labels"]), vectors.shape[1]), dtype=np.float32)
        self.bias = np.full(len(self.spec["labels"]), -20.0, dtype=np.float32)
        # Unit vectors are small numbers: the penalty is weakened to let the probabilities leave the uniform.
        fitted = LogisticRegression(C=10.0, max_iter=1000).fit(vectors, labelled.labels)
        if len(present) == 2:  # scikit-learn keeps one row of weights for two classes
            self.weights[present[1]], self.bias[present] = fitted.coef_[0], [0.0, fitted.intercept_[0]]
        else:
            self.weights[present], self.bias[present] = fitted.coef_, fitted.intercept_

    def log_probabilities(self, texts: Texts, progress: Progress | None = None) -> Floats:
        """Log-probabilities of the labels, float32 ``[rows, labels]``."""
        logits = torch.from_numpy(self.embed(texts, progress) @ self.weights.T + self.bias)
        result: Floats = logits.log_softmax(-1).numpy()
        return result

    def save(self, path: Path) -> None:
        """Write the regression's weights; the base model stays where it is."""
        saved = {"spec": self.spec, "weights": self.weights.tolist(), "bias": self.bias.tolist()}
        (path / "regression.json").write_text(json.dumps(saved), encoding="utf-8")


def train(
    spec: Mapping[str, Any],
    labelled: Labelled,
    transfer: Texts,
    base: BaseModel,
    profile: Mapping[str, str],
    seed: int,
    progress: Progress | None = None,
    before: Annotator | None = None,
) -> EmbeddingClassifier:
    """Fit; `spec` holds labels, template, max_length and truncation, and neither `transfer` nor `before` is used."""
    classifier = EmbeddingClassifier(spec, base, profile)
    classifier.fit(labelled)
    return classifier


def load(path: Path, base: BaseModel, profile: Mapping[str, str]) -> EmbeddingClassifier:
    """Read what `EmbeddingClassifier.save` wrote."""
    saved = json.loads((path / "regression.json").read_text(encoding="utf-8"))
    classifier = EmbeddingClassifier(saved["spec"], base, profile)
    classifier.weights = np.asarray(saved["weights"], dtype=np.float32)
    classifier.bias = np.asarray(saved["bias"], dtype=np.float32)
    return classifier
