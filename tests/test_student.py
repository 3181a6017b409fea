"""The student: distilled from soft labels, then alone with everything."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.annotators import Labelled
from pipeline.errors import InputError
from pipeline.student import SETTINGS, Student, distill
from pipeline.tables import Floats
from tests.conftest import BAD, GOOD, POSITIONS, sentence

LABELS = ["good", "bad", "neither one"]
SPEC: dict[str, Any] = {
    "labels": LABELS,
    "template": "{text}",
    "max_length": 48,
    "truncation": "head",
    "steps": 3,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "temperature": 2.0,
    "dropout": None,
    "freeze_embeddings": False,
}
NOTHING = Labelled({}, np.zeros(0, dtype=np.int64))
Profile = dict[str, str]


def rows(count: int = 16, seed: int = 0) -> tuple[dict[str, list[str]], np.ndarray]:
    """Texts and their true labels, good and bad by turns."""
    draw = random.Random(seed)
    truth = np.arange(count) % 2
    return {"text": [sentence(draw, BAD if label else GOOD) for label in truth]}, truth.astype(np.int64)


def soft_labels(truth: np.ndarray, sure: float = 0.9) -> np.ndarray:
    soft = np.full((len(truth), len(LABELS)), (1 - sure) / 2, dtype=np.float32)
    soft[np.arange(len(truth)), truth] = sure
    return soft


def divergence(soft: np.ndarray, student: Student, texts: dict[str, list[str]]) -> float:
    return float((soft * (np.log(soft) - student.log_probabilities(texts))).sum(axis=1).mean())


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def untrained(base: Any, profile: Profile) -> Student:
    return Student(base.path, {key: SPEC[key] for key in ("labels", "template", "max_length", "truncation")}, profile)


def test_a_student_comes_near_its_teacher_and_generalises(base: Any, profile: Profile) -> None:
    texts, truth = rows(96)
    soft = soft_labels(truth)
    before, after = (
        distill({**SPEC, "steps": steps, "batch_size": 16, "dropout": 0.0}, soft, texts, NOTHING, base, profile, seed=0)
        for steps in (1, 100)
    )
    assert divergence(soft, after, texts) < 0.5 * divergence(soft, before, texts)
    unseen, unseen_truth = rows(40, seed=9)
    assert (after.log_probabilities(unseen).argmax(axis=1) == unseen_truth).mean() > 0.8


def test_labelled_rows_alone_teach_too(base: Any, profile: Profile) -> None:
    texts, truth = rows(32)
    spec = {**SPEC, "steps": 60, "batch_size": 16, "dropout": 0.0, "temperature": 1.0}
    student = distill(spec, None, {}, Labelled(texts, truth), base, profile, seed=0)
    assert (student.log_probabilities(texts).argmax(axis=1) == truth).mean() > 0.9


def test_rows_that_a_step_has_several_times_weigh_as_often(
    base: Any, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, truth = rows(3)
    spec = {**SPEC, "batch_size": 8, "dropout": 0.0, "steps": 5}  # eight of three rows

    def scores() -> Floats:
        student = distill(spec, soft_labels(truth), texts, Labelled(texts, truth), base, profile, seed=0)
        return student.log_probabilities(texts)

    once = scores()
    monkeypatch.setattr("pipeline.student.taken_once", lambda batch, dropout: (batch, np.ones(len(batch), np.float32)))
    assert once == pytest.approx(scores(), abs=1e-3)


ONE = {"text": ["the ticket was cold and slow."]}


def settled(soft: list[float], labelled: Labelled, temperature: float, base: Any, profile: Profile) -> np.ndarray:
    """The distribution at which training comes to rest when there is but one text."""
    spec = {**SPEC, "steps": 200, "dropout": 0.0, "learning_rate": 2e-3, "temperature": temperature}
    student = distill(spec, np.array([soft], np.float32), ONE, labelled, base, profile, seed=0)
    return np.exp(student.log_probabilities(ONE)[0])


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_temperature_is_in_the_loss_and_not_in_what_is_learnt(
    temperature: float, base: Any, profile: Profile
) -> None:
    soft = [0.7, 0.2, 0.1]
    assert settled(soft, NOTHING, temperature, base, profile) == pytest.approx(soft, abs=0.02)


def test_beside_soft_labels_labelled_rows_count_as_a_batch_a_quarter_as_large(base: Any, profile: Profile) -> None:
    lesson = Labelled(ONE, np.array([2]))
    expected = (4 * np.array([0.9, 0.06, 0.04]) + 1 * np.array([0, 0, 1])) / 5
    assert settled([0.9, 0.06, 0.04], lesson, 1.0, base, profile) == pytest.approx(expected, abs=0.02)


def test_soft_labels_keep_their_weight_at_a_high_temperature(base: Any, profile: Profile) -> None:
    # Soft targets' gradients shrink with the square of the temperature, which the loss makes good for.
    assert settled([0.9, 0.06, 0.04], Labelled(ONE, np.array([2])), 8.0, base, profile)[0] > 0.6


def test_the_same_seed_gives_the_same_bytes_whatever_ran_before(base: Any, profile: Profile, tmp_path: Path) -> None:
    texts, truth = rows()
    for name, seed in (("one", 7), ("other", 7), ("another", 8)):
        (tmp_path / name).mkdir()
        distill(SPEC, soft_labels(truth), texts, NOTHING, base, profile, seed).save(tmp_path / name)
        torch.rand(100)
    one, other, another = (files_of(tmp_path / name) for name in ("one", "other", "another"))
    assert one == other
    assert one["model.safetensors"] != another["model.safetensors"]


def test_probabilities_sum_to_one_and_do_not_depend_on_a_rows_company(untrained: Student) -> None:
    texts, _ = rows(20)
    texts["text"][4] = texts["text"][11] = texts["text"][0]
    texts["text"][7] = " ".join(GOOD * 8)  # longer than it reads
    together = untrained.log_probabilities(texts)
    assert together.shape == (20, 3)
    assert together.dtype == np.float32
    assert np.exp(together).sum(axis=1) == pytest.approx(np.ones(20), abs=1e-5)
    assert np.array_equal(together[4], together[0])
    assert np.array_equal(together[11], together[0])
    alone = np.concatenate([untrained.log_probabilities({"text": [text]}) for text in texts["text"]])
    assert np.abs(alone - together).max() < 1e-5


def test_equal_texts_are_scored_once(untrained: Student) -> None:
    told: list[tuple[int, int]] = []
    untrained.log_probabilities(
        {"text": ["good food", "bad food"] * 50}, lambda done, total: told.append((done, total))
    )
    assert told[-1] == (2, 2)


def test_a_saved_student_scores_as_before(untrained: Student, profile: Profile, tmp_path: Path) -> None:
    texts, _ = rows()
    untrained.save(tmp_path)
    loaded = Student.load(tmp_path, profile)
    assert loaded.labels == LABELS
    assert loaded.settings == untrained.settings
    assert np.array_equal(loaded.log_probabilities(texts), untrained.log_probabilities(texts))


def test_a_saved_student_loads_in_plain_transformers(untrained: Student, tmp_path: Path) -> None:
    texts, _ = rows()
    untrained.save(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert [model.config.id2label[i] for i in range(3)] == LABELS
    inputs = tokenizer(texts["text"], padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
    assert np.abs(scores.numpy() - untrained.log_probabilities(texts)).max() < 1e-5


def test_what_is_no_student_is_refused(tmp_path: Path, tiny_model: Path, profile: Profile) -> None:
    for path in (tmp_path, tiny_model, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="neither a release nor a student"):
            Student.load(path, profile)
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(InputError, match="can't load the student"):
        Student.load(tmp_path, profile)


def test_a_student_never_reads_more_than_its_base_model_can(base: Any, profile: Profile) -> None:
    texts, truth = rows(4)
    texts["text"][0] = " ".join(GOOD * 20)
    student = distill({**SPEC, "max_length": 500}, soft_labels(truth), texts, NOTHING, base, profile, seed=0)
    assert student.settings["max_length"] == POSITIONS
    assert np.isfinite(student.log_probabilities(texts)).all()


def test_a_teacher_that_is_certain_is_no_trouble(base: Any, profile: Profile) -> None:
    texts, truth = rows(8)
    student = distill(SPEC, soft_labels(truth, sure=1.0), texts, NOTHING, base, profile, seed=0)
    assert np.isfinite(student.log_probabilities(texts)).all()
