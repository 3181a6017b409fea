"""The student: a sequence classifier distilled from soft labels, which then labels everything.

Loss = T^2 * KL(softmax(teacher / T) || softmax(student / T)) on the transfer set, plus cross-entropy on the
labelled rows (Hinton et al. 2015; the published PET leaves the labelled rows out). Soft labels are kept at
T = 1, so the teacher at T is its probabilities to the power 1/T, normalised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from pipeline.annotators import Labelled, Texts
from pipeline.base_model import BaseModel, load_tokenizer
from pipeline.batching import by_length, pad, split_by_length
from pipeline.errors import InputError, loading
from pipeline.last_layer import LastLayer, shorten, trial_rows
from pipeline.precision import attention_for, exact_outputs, scoring, training_numbers
from pipeline.progress import Progress
from pipeline.ragged import Ragged
from pipeline.store import canonical_json
from pipeline.tables import Floats
from pipeline.template import Encoder, Template
from pipeline.training import epochs, prepare_for_few_steps, seed_of, taken_once, weighted_sum
from pipeline.training import train as run_training

SETTINGS = "clozeline.json"
# The new head starts at random and has few steps, so that it learns faster than what is pretrained. BERT's pooler,
# which lies below it and starts at random too where the base model is a masked language model, does not.
_HEAD_FASTER = 10.0


class Student:
    """A sequence classifier in plain Hugging Face layout, with the template that it reads.

    Args:
        path: a base model's directory (a new head is made) or a student's.
        settings: template, max_length, truncation, labels.
        profile: the numeric profile.

    Attributes:
        last: the encoder's last layer, if it is computed for the first token alone.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], profile: Mapping[str, str], seed: int = 0) -> None:
        self.settings = dict(settings)
        self.labels: list[str] = list(settings["labels"])
        self.device = torch.device(profile["device"])
        self.dtype = getattr(torch, profile["dtype"])
        torch.manual_seed(seed)  # for the new head
        self.model = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32,
            **attention_for(self.device),
            id2label=dict(enumerate(self.labels)),
            label2id={label: i for i, label in enumerate(self.labels)},
        )
        self.model.eval()
        self.last = self._take_shortcut()
        self.model.to(self.device).eval()
        exact_outputs(self.model.base_model)
        self.tokenizer = load_tokenizer(path)
        self.template = Template.parse(settings["template"])
        self.encoder = Encoder(self.tokenizer, settings["max_length"], settings["truncation"])

    def _take_shortcut(self) -> LastLayer | None:
        """The encoder's last layer, computed for the first token alone, if that gives the logits of the whole."""
        last = shorten(self.model)
        if last is None:
            return None
        ids, attention = trial_rows(int(self.model.config.vocab_size))
        try:
            with torch.inference_mode():
                whole = self.model(input_ids=ids, attention_mask=attention).logits
                with last.at(ids.new_zeros(len(ids), 1)):
                    short = self.model(input_ids=ids, attention_mask=attention).logits
        except Exception:  # whatever a layer or head that was not made for this does
            return None
        return last if torch.allclose(short, whole, rtol=1e-4, atol=1e-4) else None

    @classmethod
    def load(cls, path: Path, profile: Mapping[str, str]) -> Student:
        """Read a student from its directory.

        Raises:
            InputError: it is not a student's, or damaged.
        """
        if not (path / SETTINGS).is_file():
            raise InputError(
                "this is neither a release nor a student", where=str(path), fix="give a release's directory"
            )
        with loading("the student", path, "take another copy of it, or label again"):
            settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
            return cls(path, settings, profile)

    def save(self, path: Path) -> None:
        """Write weights, tokenizer and settings; loads in plain transformers."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        (path / SETTINGS).write_text(canonical_json(self.settings), encoding="utf-8")

    def encode(self, texts: Texts) -> Ragged:
        """Rows as the student reads them."""
        return self.encoder.encode(self.template, texts).tokens

    def logits(self, tokens: Ragged, rows: npt.NDArray[np.integer]) -> torch.Tensor:
        """Logits ``[rows, labels]`` of some rows, with a graph when gradients are on."""
        ids, attention = pad(tokens, rows, self.tokenizer.pad_token_id, self.device)
        with nullcontext() if self.last is None else self.last.at(ids.new_zeros(len(ids), 1)):
            logits: torch.Tensor = self.model(input_ids=ids, attention_mask=attention).logits.float()
        return logits

    def log_probabilities(self, texts: Texts, progress: Progress | None = None) -> Floats:
        """Log-probabilities of the labels, float32 ``[rows, labels]``; equal texts are scored once."""
        tokens = self.encode(texts)
        distinct, position = tokens.distinct()
        result = np.zeros((len(distinct), len(self.labels)), dtype=np.float32)
        done = 0
        with scoring(self.model, self.model.base_model, self.dtype):
            for batch in by_length(tokens.lengths[distinct], self.device):
                logits = self.logits(tokens, distinct[batch])
                result[batch] = logits.log_softmax(-1).cpu().numpy()
                done += len(batch)
                if progress:
                    progress(done, len(distinct))
        return result[position]


def sound(scores: Floats) -> Floats:
    """A student's scores, if they can be used.

    Raises:
        InputError: some are no numbers.
    """
    strange = int((~np.isfinite(scores)).any(axis=1).sum())
    if strange:
        raise InputError(
            f"the student's scores of {strange} of {len(scores)} rows are no numbers",
            where="student",
            fix="lower student.learning_rate, or take another base_model",
        )
    return scores


def distill(
    spec: Mapping[str, Any],
    soft: Floats | None,
    transfer: Texts,
    labelled: Labelled,
    base: BaseModel,
    profile: Mapping[str, str],
    seed: int,
    progress: Progress | None = None,
) -> Student:
    """Train a student.

    Args:
        spec: labels, template, max_length, truncation, steps, batch_size, learning_rate, temperature, dropout,
            freeze_embeddings.
        soft: soft labels at T = 1 for the transfer set, float32 ``[rows, labels]``; None trains on the labelled
            rows alone, which is plain fine-tuning.
        transfer: the transfer set's text columns.
        labelled: the labelled rows, may be none.
        base: where to start from.
    """
    settings = {key: spec[key] for key in ("labels", "template", "truncation")}
    settings["dtype"] = profile["dtype"]  # so that `clozeline predict` computes as the release did
    settings["max_length"] = min(spec["max_length"], base.positions)
    student = Student(base.path, settings, profile, seed=seed_of(seed, "head"))
    prepare_for_few_steps(student.model, dropout=spec["dropout"], freeze_embeddings=spec["freeze_embeddings"])
    temperature, batch_size = spec["temperature"], spec["batch_size"]
    parts: list[tuple[Ragged, torch.Tensor, float, Iterator[Any]]] = []
    if soft is not None:
        logits = torch.from_numpy(np.log(np.maximum(soft, 1e-8)))
        target = (logits / temperature).softmax(-1)
        parts.append(
            (
                student.encode(transfer),
                target,
                temperature,
                epochs(len(soft), batch_size, seed_of(seed, "soft")),
            )
        )
    if len(labelled):
        # Beside soft labels the labelled rows get a batch a quarter as large: seen often enough, they stay.
        rows = max(batch_size // 4, 1) if soft is not None else batch_size
        hard = F.one_hot(torch.from_numpy(labelled.labels), len(spec["labels"])).float()
        parts.append((student.encode(labelled.texts), hard, 1.0, epochs(len(labelled), rows, seed_of(seed, "hard"))))

    def losses_of_step(step: int) -> Iterator[torch.Tensor]:
        chosen = [(tokens, target, t, next(order)) for tokens, target, t, order in parts]
        total = sum(len(numbers) for *_, numbers in chosen)
        with training_numbers(student.device, student.dtype):
            for tokens, target, t, batch in chosen:
                rows, times = taken_once(batch, spec["dropout"])
                for part in split_by_length(tokens.lengths[rows], student.device):
                    some = rows[part]
                    scores = student.logits(tokens, some)
                    wanted = target[some].to(student.device)
                    losses = F.kl_div((scores / t).log_softmax(-1), wanted, reduction="none").sum(-1)
                    yield weighted_sum(losses, times[part]) * t * t / total

    run_training(
        student.model,
        losses_of_step,
        steps=spec["steps"],
        learning_rate=spec["learning_rate"],
        seed=seed,
        head=lambda name: not name.startswith(student.model.base_model_prefix),
        head_faster=_HEAD_FASTER,
        progress=progress,
    )
    return student
