"""Cross-validation of one annotator, and how far training takes it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import fitting
from pipeline.annotators import Labelled, Texts, pet
from pipeline.base_model import BaseModel
from pipeline.cloze import WordScorer
from pipeline.fitting import fit_annotator
from pipeline.progress import Progress
from pipeline.student import distill
from pipeline.tables import Floats
from pipeline.training import Diverged
from tests.conftest import BAD, GOOD, sentence

SPEC: dict[str, Any] = {
    "method": "pet",
    "pattern": "{text} It was {mask}.",
    "words": [["good", ["good"]], ["bad", ["bad"]]],
    "labels": ["good", "bad"],
    "steps": 30,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "mlm_alpha": 0.0,
    "mlm_batch_size": 0,
    "max_length": 32,
    "truncation": "head",
    "dropout": 0.0,
    "freeze_embeddings": True,
    "folds": 2,
    "learned": "auto",
    "match_prior": "auto",
}


@pytest.fixture(scope="module")
def labelled() -> Labelled:
    draw = random.Random(0)
    texts = [sentence(draw, BAD if i % 2 else GOOD) for i in range(24)]
    return Labelled({"text": texts}, np.arange(24) % 2)


def fitted(labelled: Labelled, base: BaseModel, profile: dict[str, str], **changes: Any) -> fitting.Fitted:
    return fit_annotator({**SPEC, **changes}, labelled, labelled.texts, base, profile, seed=0)


def test_held_out_rows_are_scored_by_those_who_did_not_see_them(
    labelled: Labelled, base: BaseModel, profile: dict[str, str]
) -> None:
    found = fitted(labelled, base, profile)
    assert found.folds == 2
    assert found.held_out is not None
    assert found.held_out.shape == (24, 2)
    assert found.accuracy == pytest.approx((found.held_out.argmax(axis=1) == labelled.labels).mean(), abs=1e-6)
    own = found.annotator.log_probabilities(labelled.texts)
    assert np.abs(own - found.held_out).max() > 0.01


def test_labels_without_meaning_are_not_found_in_held_out_rows(base: BaseModel, profile: dict[str, str]) -> None:
    draw = random.Random(1)
    texts = [sentence(draw, draw.choice([BAD, GOOD])) for _ in range(24)]
    noise = Labelled({"text": texts}, np.array([draw.randrange(2) for _ in range(24)]))
    found = fitted(noise, base, profile, steps=60, learned=1.0)
    learnt = found.annotator.log_probabilities({"text": texts}).argmax(axis=1)
    assert (learnt == noise.labels).mean() > 0.9
    assert found.accuracy is not None
    assert found.accuracy < 0.8


def test_an_annotator_stands_on_the_line_from_the_base_model_to_the_trained_one(
    labelled: Labelled, base: BaseModel, profile: dict[str, str]
) -> None:
    def weights(learned: float | str, rows: Labelled = labelled) -> dict[str, torch.Tensor]:
        model = pet.train({**SPEC, "learned": learned}, rows, labelled.texts, base, profile, 0).model.model
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    start, end = weights(1.0, Labelled({}, np.zeros(0, dtype=np.int64))), weights(1.0)
    quarter, auto = weights(0.25), weights("auto")
    moved = [name for name in start if not torch.equal(start[name], end[name])]
    assert moved
    for name in start:
        assert torch.allclose(quarter[name], start[name] + 0.25 * (end[name] - start[name]), atol=1e-6)
        assert torch.allclose(auto[name], start[name] + 24 / 40 * (end[name] - start[name]), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"learned": 1.0, "freeze_embeddings": False, "dropout": 0.1}])
def test_an_annotator_trained_anew_is_what_a_new_one_is(
    labelled: Labelled, base: BaseModel, profile: dict[str, str], changes: dict[str, Any]
) -> None:
    def trained(rows: Labelled, seed: int, before: pet.PetAnnotator | None = None) -> pet.PetAnnotator:
        return pet.train({**SPEC, "steps": 4, **changes}, rows, labelled.texts, base, profile, seed, before=before)

    first = trained(labelled.take(np.arange(5)), 1)
    scores = first.log_probabilities(labelled.texts)
    anew, fresh = trained(labelled, 0, first), trained(labelled, 0)
    assert anew is first
    assert not np.array_equal(anew.log_probabilities(labelled.texts), scores)
    assert torch.equal(anew.scorer.bias, fresh.scorer.bias)
    own = dict(fresh.model.model.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in anew.model.model.named_parameters())


def test_a_fit_of_one_model_gives_what_a_model_for_each_training_gives(
    labelled: Labelled, base: BaseModel, profile: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"steps": 3, "mlm_alpha": 0.1, "mlm_batch_size": 4}
    one = fitted(labelled, base, profile, **changes)
    monkeypatch.setattr(pet.PetAnnotator, "restore", lambda self: False)
    many = fitted(labelled, base, profile, **changes)
    assert np.array_equal(one.held_out, many.held_out)
    assert np.array_equal(*(fit.annotator.log_probabilities(labelled.texts) for fit in (one, many)))


def test_all_trainings_of_a_fit_share_one_model(
    labelled: Labelled, base: BaseModel, profile: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[pet.PetAnnotator] = []

    def calibrate(self: pet.PetAnnotator, texts: Texts) -> None:
        made.append(self)

    monkeypatch.setattr(pet.PetAnnotator, "calibrate", calibrate)
    assert made == [fitted(labelled, base, profile, steps=2, folds=3).annotator]


def test_a_row_that_a_step_has_several_times_is_read_once_and_weighs_as_much(
    labelled: Labelled, base: BaseModel, profile: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few, shown, original = labelled.take(np.arange(3)), list[int](), WordScorer.word_scores

    def counted(self: WordScorer, ids: torch.Tensor, attention: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        shown.append(len(ids))
        return original(self, ids, attention, at)

    def scores(dropout: float) -> Floats:
        shown.clear()
        spec = {**SPEC, "steps": 4, "learned": 1.0, "dropout": dropout}
        with monkeypatch.context() as patch:
            patch.setattr(WordScorer, "word_scores", counted)
            trained = pet.train(spec, few, {"text": []}, base, profile, 0)
        return trained.log_probabilities(labelled.texts)

    once = scores(0.0)
    assert sum(shown) == 4 * 3
    scores(0.1)
    assert sum(shown) == 4 * 8
    monkeypatch.setattr(pet, "taken_once", lambda rows, dropout: (rows, np.ones(len(rows), dtype=np.float32)))
    assert once == pytest.approx(scores(0.0), abs=1e-3)
    assert sum(shown) == 4 * 8


def test_losses_stay_exact_where_the_model_computes_in_bf16(
    labelled: Labelled, base: BaseModel, profile: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = []

    def training(model: Any, losses_of_step: Any, **settings: Any) -> None:
        numbers.extend(loss.dtype for loss in losses_of_step(0))

    monkeypatch.setattr("pipeline.annotators.pet.run_training", training)
    monkeypatch.setattr("pipeline.student.run_training", training)
    coarse = {**profile, "dtype": "bfloat16"}
    pet.train(SPEC, labelled, labelled.texts, base, coarse, 0)
    student = {**SPEC, "template": "{text}", "temperature": 2.0}
    distill(student, np.full((24, 2), 0.5, np.float32), labelled.texts, labelled, base, coarse, 0)
    assert set(numbers) == {torch.float32}
    assert len(numbers) >= 3


def test_a_trained_annotators_label_shares_are_moved_to_those_of_its_labelled_rows(
    labelled: Labelled, base: BaseModel, profile: dict[str, str]
) -> None:
    uneven = labelled.take(np.array([0, 2, 4, 6, 1]))  # four good rows and a bad one

    def said(match_prior: float | str, rows: Labelled = uneven, transfer: Texts = labelled.texts) -> Floats:
        annotator = pet.train({**SPEC, "match_prior": match_prior}, rows, transfer, base, profile, 0)
        return annotator.log_probabilities(labelled.texts)

    none, half, all_ = said(0.0), said(0.5), said(1.0)
    assert np.exp(all_).mean(axis=0) == pytest.approx([5 / 7, 2 / 7], abs=1e-3)  # one row more of each
    apart = [scores[:, 0] - scores[:, 1] for scores in (none, half, all_, said("auto"))]
    assert np.ptp(apart[2] - apart[0]) < 1e-4  # the same for every row
    assert abs(apart[2] - apart[0]).min() > 0.1
    assert apart[1] == pytest.approx((apart[0] + apart[2]) / 2, abs=1e-4)
    assert apart[3] == pytest.approx(apart[0] + (1 - 5 / 40) / 3 * (apart[2] - apart[0]), abs=1e-4)
    nothing = labelled.take(np.arange(0))
    assert said(1.0, nothing).tolist() == said(0.0, nothing).tolist()
    empty: Texts = {"text": []}
    assert said(1.0, uneven, empty).tolist() == said(0.0, uneven, empty).tolist()


def test_moved_shares_hold_for_labels_with_several_words_and_are_saved(
    labelled: Labelled, base: BaseModel, profile: dict[str, str], tmp_path: Path
) -> None:
    words = [["good", ["good", "great", "unseen"]], ["bad", ["bad"]]]  # one word of several tokens
    spec = {**SPEC, "words": words, "match_prior": 1.0}
    uneven = labelled.take(np.array([0, 2, 4, 6, 1]))
    annotator = pet.train(spec, uneven, labelled.texts, base, profile, 0)
    assert len(annotator.verbalizer.widths) == 2
    scores = annotator.log_probabilities(labelled.texts)
    assert np.exp(scores).mean(axis=0) == pytest.approx([5 / 7, 2 / 7], abs=1e-3)
    annotator.save(tmp_path)
    assert pet.load(tmp_path, base, profile).log_probabilities(labelled.texts).tolist() == scores.tolist()


def test_held_out_scores_that_are_no_numbers_are_a_training_that_diverged(
    labelled: Labelled, base: BaseModel, profile: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pet.PetAnnotator.log_probabilities

    def log_probabilities(self: pet.PetAnnotator, texts: Texts, progress: Progress | None = None) -> Floats:
        scores = real(self, texts, progress)
        scores[0] = np.nan
        return scores

    monkeypatch.setattr(pet.PetAnnotator, "log_probabilities", log_probabilities)
    with pytest.raises(Diverged, match="held-out scores of 2 of 24 labelled rows are no numbers"):
        fitted(labelled, base, profile, steps=1)


def test_without_folds_nothing_is_held_out(labelled: Labelled, base: BaseModel, profile: dict[str, str]) -> None:
    found = fitted(labelled, base, profile, folds=0)
    assert (found.folds, found.accuracy, found.held_out) == (0, None, None)


def test_progress_counts_all_trainings_and_ends_at_the_end(
    labelled: Labelled, base: BaseModel, profile: dict[str, str]
) -> None:
    told: list[tuple[int, int]] = []
    fit_annotator(SPEC, labelled, labelled.texts, base, profile, 0, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert {total for _, total in told} == {90}
    assert told[-1] == (90, 90)
