"""The sample task: complete, and not so easy that any method would do."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.naive_bayes import ComplementNB, MultinomialNB

from pipeline.task import Task

FOLDER = Path(__file__).resolve().parent.parent / "data" / "tickets"


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.load(FOLDER / "task.yaml")


@pytest.fixture(scope="module")
def labelled(task: Task) -> list[dict[str, str]]:
    return pq.read_table(task.path(task.inputs.labelled or "")).to_pylist()


@pytest.fixture(scope="module")
def tested(task: Task) -> list[dict[str, str]]:
    return pq.read_table(task.path(task.inputs.test or "")).to_pylist()


@pytest.fixture(scope="module")
def unlabelled(task: Task) -> list[dict[str, str]]:
    return [row for file in task.unlabelled_files() for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def messages(task: Task, labelled: list, tested: list, unlabelled: list) -> list[str]:  # type: ignore[type-arg]
    (column,) = task.inputs.text
    return [row[column] for row in [*labelled, *tested, *unlabelled]]


Rows = list[dict[str, str]]


def test_the_files_have_the_rows_that_the_documentation_names(
    task: Task, labelled: Rows, tested: Rows, unlabelled: Rows
) -> None:
    assert len(task.label_names) == 6
    assert len(labelled) == 48
    assert len(tested) == 240
    assert len(task.unlabelled_files()) == 2
    assert len(unlabelled) >= 900
    assert f"{len(unlabelled)} to label" in (FOLDER / "task.yaml").read_text()


def test_each_label_has_rows_enough_to_be_cross_validated_and_tested(task: Task, labelled: Rows, tested: Rows) -> None:
    for rows, least in ((labelled, task.resolved("training")["folds"]), (tested, 15)):
        counts = Counter(row["topic"] for row in rows)
        assert set(counts) == set(task.label_names)
        assert min(counts.values()) >= least


def test_unlabelled_rows_hold_no_label(unlabelled: Rows) -> None:
    assert all("topic" not in row for row in unlabelled)


def test_ids_are_unique_and_texts_are_distinct_and_not_blank(
    labelled: Rows, tested: Rows, unlabelled: Rows, messages: list[str]
) -> None:
    ids = [row["ticket"] for row in [*labelled, *tested, *unlabelled] if "ticket" in row]
    assert len(set(ids)) == len(ids)
    assert len({message.strip().lower() for message in messages}) == len(messages)
    assert all(message.strip() for message in messages)


def words_of(message: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", message.lower())


def test_label_words_stand_in_few_of_the_messages(task: Task, messages: list[str]) -> None:
    label_words = {word.lower() for words in task.labels.values() for word in words}
    holding = sum(not label_words.isdisjoint(words_of(message)) for message in messages)
    assert holding < 0.30 * len(messages)


def test_no_two_messages_share_half_of_their_phrases(messages: list[str]) -> None:
    """Phrases are runs of four words; the share is of the message that has fewer."""
    phrases = []
    for message in messages:
        words = words_of(message)
        phrases.append({tuple(words[i : i + 4]) for i in range(len(words) - 3)})
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    shared: Counter[tuple[int, int]] = Counter()
    for number, mine in enumerate(phrases):
        for phrase in mine:
            shared.update((other, number) for other in holders[phrase])
            holders[phrase].append(number)
    alike = [
        (messages[one], messages[other])
        for (one, other), count in shared.items()
        if 2 * count >= min(len(phrases[one]), len(phrases[other]))
    ]
    assert alike == []
    assert shared  # otherwise nothing was compared


@pytest.mark.parametrize("classifier", [MultinomialNB, ComplementNB])
def test_counting_words_is_not_enough(classifier: type, task: Task, labelled: Rows, tested: Rows) -> None:
    vectorizer = TfidfVectorizer()
    features = vectorizer.fit_transform([row["message"] for row in labelled])
    model = classifier().fit(features, [row["topic"] for row in labelled])
    predicted = model.predict(vectorizer.transform([row["message"] for row in tested]))
    accuracy = np.mean(predicted == np.array([row["topic"] for row in tested]))
    assert 1 / 6 < accuracy < 0.75
