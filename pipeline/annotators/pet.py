"""PET: a masked language model fine-tuned on one pattern (Schick & Schütze 2021).

Loss = (1 - alpha) * cross-entropy over the label words at the mask + alpha * MLM on the transfer set, where
MLM never picks padding, special tokens, the slot or the pattern's own tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.annotators import Annotator, Labelled, Texts
from pipeline.base_model import BaseModel, load_tokenizer
from pipeline.batching import pad, split_by_length
from pipeline.cloze import ClozeModel, WordScorer, stack_words
from pipeline.ensemble import Doubles, prior_shift, smoothed_shares
from pipeline.masking import mask
from pipeline.progress import Progress
from pipeline.store import canonical_json
from pipeline.tables import Floats
from pipeline.template import Encoded, Encoder, Template
from pipeline.training import Diverged, epochs, prepare_for_few_steps, seed_of, taken_once, weighted_sum
from pipeline.training import train as run_training
from pipeline.verbalizer import Verbalizer

LEARNED_ROWS = 40  # chosen on rows cut from train (docs/benchmarks.md)
PRIOR_ROWS = 256  # of unlabelled text, to see how often each label is said: as many as Hu et al. (2022) take
_SETTINGS = "annotator.json"


class PetAnnotator:
    """A pattern, its verbalizer and a fine-tuned masked language model."""

    def __init__(self, spec: Mapping[str, Any], base: BaseModel, profile: Mapping[str, str]) -> None:
        self.spec = dict(spec)
        self.template = Template.parse(spec["pattern"]).require_mask()
        self.tokenizer = load_tokenizer(base.path)
        self.encoder = Encoder(self.tokenizer, min(spec["max_length"], base.positions), spec["truncation"])
        self.verbalizer = Verbalizer.resolve(dict(spec["words"]), self.tokenizer)
        self.model = ClozeModel(base.path, profile)
        self.scorer = WordScorer(self.model, self.verbalizer)
        self._untrained: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    @property
    def trained_weights(self) -> list[torch.nn.Parameter]:
        """The weights that training changes, once `prepare_for_few_steps` has been told."""
        return [parameter for parameter in self.model.model.parameters() if parameter.requires_grad]

    def remember(self) -> list[torch.Tensor]:
        """Keep the words' prior, and in main memory the weights, as they are before a training; returns the weights."""
        if self._untrained is None:
            weights = [parameter.detach().to("cpu", copy=True) for parameter in self.trained_weights]
            self._untrained = self.scorer.bias.clone(), weights
        return self._untrained[1]

    def restore(self) -> bool:
        """Be again what was remembered, if anything was."""
        if self._untrained is None:
            return False
        bias, weights = self._untrained
        self.scorer.bias = bias.clone()
        with torch.no_grad():
            for parameter, before in zip(self.trained_weights, weights, strict=True):
                parameter.copy_(before)
        return True

    def encode(self, texts: Texts) -> dict[int, Encoded]:
        """Rows with as many masks as the words have tokens, one encoding a token count."""
        cache: dict[Any, Any] = {}
        return {
            width: self.encoder.encode(self.template, texts, masks=width, cache=cache)
            for width in self.verbalizer.widths
        }

    def calibrate(self, texts: Texts) -> None:
        """Set the label words' prior from unlabelled rows."""
        some = _some(texts)
        if len(next(iter(some.values()), [])):
            self.scorer.calibrate(self.scorer.score(self.encode(some)))

    def match_prior(self, texts: Texts, target: Doubles, strength: float) -> None:
        """Move the mean of the labels' probabilities over unlabelled rows towards a target.

        Args:
            texts: the unlabelled rows, of which `PRIOR_ROWS` are read.
            target: float64 ``[labels]``, summing to one, all positive.
            strength: the part of the way, in log-probabilities; 0..1.
        """
        shift = shares_shift(self, texts, target, strength)
        of_words = shift[[word.label for word in self.verbalizer.words]]
        self.scorer.bias -= torch.from_numpy(of_words).to(self.scorer.bias)

    def log_probabilities(self, texts: Texts, progress: Progress | None = None) -> Floats:
        """Log-probabilities of the labels, float32 ``[rows, labels]``."""
        return self.scorer.log_probabilities(self.scorer.score(self.encode(texts), progress))

    def save(self, path: Path) -> None:
        """Write pattern, words, prior and the weights that training changed."""
        settings = {**self.spec, "prior": self.scorer.bias.cpu().tolist()}
        (path / _SETTINGS).write_text(canonical_json(settings), encoding="utf-8")
        self.model.save_delta(path)


def shares_shift(annotator: Annotator, texts: Texts, target: Doubles, strength: float) -> Doubles:
    """What to add to any annotator's log-probabilities to move its label shares; see `PetAnnotator.match_prior`.

    Returns:
        float64 ``[labels]``; zeros where there is no row to see its shares from.
    """
    said: Floats = np.exp(annotator.log_probabilities(_some(texts)))
    said = said[np.isfinite(said).all(axis=1)]  # scores that are no numbers are told of by those who use them
    return strength * prior_shift(said, target) if len(said) else np.zeros_like(target)


def _some(texts: Texts) -> Texts:
    """As many unlabelled rows as it takes to see how often each label is said."""
    return {name: column[:PRIOR_ROWS] for name, column in texts.items()}


def load(path: Path, base: BaseModel, profile: Mapping[str, str]) -> PetAnnotator:
    """Read what `PetAnnotator.save` wrote."""
    settings = json.loads((path / _SETTINGS).read_text(encoding="utf-8"))
    prior = settings.pop("prior")
    annotator = PetAnnotator(settings, base, profile)
    annotator.model.load_delta(path)
    annotator.scorer.bias = torch.tensor(prior, device=annotator.model.device)
    return annotator


def train(
    spec: Mapping[str, Any],
    labelled: Labelled,
    transfer: Texts,
    base: BaseModel,
    profile: Mapping[str, str],
    seed: int,
    progress: Progress | None = None,
    before: Annotator | None = None,
) -> PetAnnotator:
    """Calibrate and fine-tune; with no labelled rows or no steps, calibrate alone (zero-shot).

    ``before``, changed in place, is what is returned if it can be: trained anew, the same bytes without loading and
    calibrating a model again, which takes as long as five steps of sixteen rows.

    Args:
        spec: pattern, words ([[label, [word, ...]], ...]), steps, batch_size, learning_rate, mlm_alpha,
            mlm_batch_size, max_length, truncation, dropout, freeze_embeddings, learned, match_prior, folds (with any,
            what it takes to begin anew is kept).

    Raises:
        Diverged: what the model says of this pattern is no number, from the start or in training.
    """
    if isinstance(before, PetAnnotator) and before.spec == dict(spec) and before.restore():
        annotator = before
    else:
        annotator = PetAnnotator(spec, base, profile)
        annotator.calibrate(transfer)
        if not annotator.scorer.bias.isfinite().all():
            raise Diverged("the base model's own scores of this pattern are no numbers")
    if len(labelled) == 0 or spec["steps"] == 0:
        return annotator
    prepare_for_few_steps(annotator.model.model, dropout=spec["dropout"], freeze_embeddings=spec["freeze_embeddings"])
    model, scorer, pad_id = annotator.model, annotator.scorer, annotator.tokenizer.pad_token_id
    encoded = annotator.encode(labelled.texts)
    targets = torch.from_numpy(labelled.labels).to(model.device)
    rows_of_step = epochs(len(labelled), spec["batch_size"], seed_of(seed, "rows"))
    alpha = spec["mlm_alpha"]
    masking = _Masking(annotator, transfer, spec["mlm_batch_size"], seed) if alpha > 0 else None

    lengths = next(iter(encoded.values())).tokens.lengths
    share = learned_share(spec["learned"], len(labelled))
    start = annotator.remember() if share < 1 or spec["folds"] else []

    def losses_of_step(step: int) -> Iterator[torch.Tensor]:
        batch = next(rows_of_step)
        rows, times = taken_once(batch, spec["dropout"])
        with model.autocast():  # one context a step: the weights are cast to bf16 once for all its passes
            for part in split_by_length(lengths[rows], model.device):
                some = rows[part]
                scores = []
                for inputs in encoded.values():
                    ids, attention = pad(inputs.tokens, some, pad_id, model.device)
                    at = torch.from_numpy(inputs.mask_at[some]).to(model.device)
                    scores.append(scorer.word_scores(ids, attention, at))
                logits = scorer.label_logits(stack_words(scores, len(annotator.verbalizer.words)))
                losses = F.cross_entropy(logits.float(), targets[some], reduction="none")
                yield (1 - alpha) * weighted_sum(losses, times[part]) / len(batch)
            if masking is not None:
                for loss in masking.losses():
                    yield alpha * loss

    run_training(
        model,
        losses_of_step,
        steps=spec["steps"],
        learning_rate=spec["learning_rate"],
        seed=seed,
        progress=progress,
    )
    if share < 1:
        with torch.no_grad():
            for parameter, weight in zip(annotator.trained_weights, start, strict=True):
                parameter.copy_(torch.lerp(weight.to(parameter.device), parameter, share))
    if strength := prior_strength(spec["match_prior"], len(labelled)):
        annotator.match_prior(transfer, smoothed_shares(labelled.counts(len(spec["words"]))), strength)
    return annotator


def prior_strength(setting: str | float, rows: int) -> float:
    """How far a trained annotator's label shares are moved to those of its labelled rows.

    A handful of rows leaves a masked language model with a bias for one label: trained on ten rows of SST-2, half
    of them positive, it called 67 to 80 % of others negative, of which half are. Moving it all the way gains most where
    the labelled rows' shares are exactly those of the rows to label, and loses most where they are not; the more rows
    it has learned from the less there is to gain. Hence a third of the way, and less with more rows
    (docs/benchmarks.md).

    Args:
        setting: a share, or ``auto``: (1 - n / m) / 3, and nothing from m rows on.
        rows: n, those that it was trained on; m is `LEARNED_ROWS`.

    >>> prior_strength("auto", 10), prior_strength("auto", 50), prior_strength(0.5, 50)
    (0.25, 0.0, 0.5)
    """
    return max(1 - rows / LEARNED_ROWS, 0.0) / 3 if setting == "auto" else float(setting)


def learned_share(setting: str | float, rows: int) -> float:
    """How far along the line from the base model's weights to the trained ones an annotator stands.

    A handful of rows can teach a masked language model less than it knows: on ten labelled rows of Yelp fifty steps
    took an untrained pattern from 76 to 60 % (docs/benchmarks.md, which compares this rule with choosing by
    cross-validation). Weights are averaged as Wortsman et al. (2022) do it.

    Args:
        setting: a share, or ``auto``: n / m, and all of it from m rows on.
        rows: n, those that it was trained on; m is `LEARNED_ROWS`.

    >>> learned_share("auto", 10), learned_share("auto", 50), learned_share(0.5, 50)
    (0.25, 1.0, 0.5)
    """
    return min(rows / LEARNED_ROWS, 1.0) if setting == "auto" else float(setting)


class _Masking:
    """Masked-language modelling on the transfer set, rendered in the annotator's pattern."""

    def __init__(self, annotator: PetAnnotator, transfer: Texts, batch_size: int, seed: int) -> None:
        self.annotator, self.transfer = annotator, transfer
        self.random = np.random.default_rng(seed_of(seed, "mlm"))
        self.rows_of_step = epochs(len(next(iter(transfer.values()))), batch_size, seed_of(seed, "mlm rows"))

    def losses(self) -> Iterator[torch.Tensor]:
        """The MLM loss of the next batch, as addends; none if no row of it has a token of its own."""
        rows = next(self.rows_of_step)
        texts = {name: [column[i] for i in rows] for name, column in self.transfer.items()}
        inputs = next(iter(self.annotator.encode(texts).values()))
        tokenizer, model = self.annotator.tokenizer, self.annotator.model
        masked = mask(inputs, tokenizer.mask_token_id, len(tokenizer), self.random)
        hidden = masked.rows
        for part in split_by_length(masked.tokens.lengths[hidden], model.device) if len(hidden) else ():
            ids, attention = pad(masked.tokens, hidden[part], tokenizer.pad_token_id, model.device)
            rows_at, columns, targets = (torch.from_numpy(at).to(model.device) for at in masked.of(hidden[part]))
            logits = model.logits_at(ids, attention, rows_at, columns)
            yield F.cross_entropy(logits.float(), targets, reduction="sum") / len(masked.targets)
