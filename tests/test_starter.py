"""Drafts of task files: what becomes the label, and that `check` takes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.checks import check_task
from pipeline.errors import InputError
from pipeline.release import OWN_COLUMNS
from pipeline.starter import starter_task
from pipeline.tables import ColumnRoles, ingest
from pipeline.task import Task

WriteParquet = Callable[..., Path]
TEXTS = [f"the food of day {i} was good" for i in range(12)]


@pytest.fixture
def drafted(write_parquet: WriteParquet, tiny_model: Path) -> Callable[..., tuple[str, Task]]:
    """Draft a task from columns: the file's text, and the task that it is."""

    def draft(**columns: Any) -> tuple[str, Task]:
        file = write_parquet(columns)
        text = starter_task(file, file.name, file.parent)
        path = file.parent / "task.yaml"
        path.write_text(text, encoding="utf-8")
        return text, Task.load(path, [f"base_model={tiny_model}"])

    return draft


Draft = Callable[..., tuple[str, Task]]


def repeated(values: Sequence[Any], kind: pa.DataType | None = None) -> pa.Array:
    """A column of twelve rows."""
    return pa.array([values[i % len(values)] for i in range(12)], kind)


# ---- the label ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        ([True, False], pa.bool_(), ["false", "true"]),
        ([0, 1], pa.int64(), ["0", "1"]),
        ([0.0, 1.0, 2.0], pa.float64(), ["0", "1", "2"]),
        ([0.0, 3.0], pa.float32(), ["0", "3"]),
        ([0.0, 3.0], pa.float16(), ["0", "3"]),
    ],
    ids=str,
)
def test_numbers_and_truth_values_are_the_labels_that_ingest_finds(
    values: list[Any], kind: pa.DataType, names: list[str], drafted: Draft, tmp_path: Path
) -> None:
    for name in ("label", "is_spam"):
        text, task = drafted(text=TEXTS, **{name: repeated(values, kind)})
        assert (task.label_names, task.inputs.label) == (names, name)
        check_task(task)
        out = tmp_path / name
        out.mkdir()
        ingest(tmp_path / "rows.parquet", ColumnRoles(("text",), label=name), out, label_names=names)
        assert set(pq.read_table(out / "rows.parquet").column("label").to_pylist()) == set(range(len(names)))
        assert text.count("TODO: a word that says what it means") == len(names)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_whole_numbers_of_which_some_are_missing_are_labels_and_the_rows_without_are_told(
    missing: float | None, drafted: Draft
) -> None:
    text, task = drafted(text=TEXTS, label=pa.array([0.0, 1.0, missing] * 4, from_pandas=False))
    assert task.label_names == ["0", "1"]
    assert 'TODO: some rows have no "label", or an empty one' in text


def test_columns_of_words_are_labels_before_those_of_truth_values_unless_these_are_called_so(drafted: Draft) -> None:
    flags, words = repeated([True, False]), repeated(["good", "bad"])
    assert drafted(text=TEXTS, has_picture=flags, mood=words)[1].inputs.label == "mood"
    assert drafted(text=TEXTS, mood=words, label=flags)[1].inputs.label == "label"


@pytest.mark.parametrize(
    ("column", "why"),
    [
        (pa.array([[1], [2]] * 6), "it holds list<element: int64>"),
        (repeated([b"a", b"b"]), "it holds binary"),
        (repeated([0.5, 1.0]), "it holds double, not all of them whole"),
        (repeated([1.0, float("inf")]), "it holds double, not all of them whole"),
        (repeated(["good"]), "it holds fewer than two different values"),
        (repeated(["", "good"]), "it holds fewer than two different values"),
        (pa.nulls(12), "it holds null"),
        (pa.array([f"l{i}" for i in range(12)]), "it holds 12 different values in 12 rows"),
        (repeated(["good", "bad" * 40]), "it holds values of more than 100 characters"),
        (pa.array([{"a\nb": 1}] * 12), r'it holds struct<a\nb: int64>"'),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_column_called_like_a_label_that_can_not_be_one_is_told_with_the_reason(
    column: pa.Array, why: str, drafted: Draft
) -> None:
    text, task = drafted(text=pa.array([f"{text} {'x' * 200}" for text in TEXTS]), label=column)
    assert '  # "label" is not taken for the label: ' in text
    assert why in text
    assert task.inputs.labelled is None
    assert "  # label: label\n" in text
    assert task.inputs.id is None


def test_labels_too_many_for_the_draft_are_told_even_where_the_first_rows_have_few(write_parquet: WriteParquet) -> None:
    labels = [f"{i % 2}" for i in range(5000)] + [f"{i}" for i in range(200)]
    text = starter_task(write_parquet({"text": [f"text {i}" for i in range(5200)], "label": labels}))
    assert '"label" is not taken for the label: it holds more than 100 different values' in text


# ---- the text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.int64(), pa.list_(pa.int64()), pa.binary()], ids=str)
@pytest.mark.parametrize("labels", [["good", "bad"], [f"label {i}" for i in range(12)]], ids=["few", "many"])
def test_label_is_not_taken_for_the_text(kind: pa.DataType, labels: list[str], write_parquet: WriteParquet) -> None:
    texts = [[i] if pa.types.is_list(kind) else b"x" if kind == pa.binary() else i for i in range(12)]
    file = write_parquet({"text": pa.array(texts, kind), "label": repeated(labels)})
    with pytest.raises(InputError) as caught:
        starter_task(file)
    read = pq.read_schema(file).field("text").type
    assert f"no column holds text; the file has: text ({read}), label (string)" in str(caught.value)
    assert str(file) in str(caught.value)


def test_label_longer_than_the_text_stays_the_label(drafted: Draft) -> None:
    _, task = drafted(text=["ok", "no"] * 6, topic=repeated(["the food and the room", "the staff and the meal"]))
    assert (task.inputs.text, task.inputs.label) == (["text"], "topic")


def test_text_may_be_called_like_a_label_beside_the_label(drafted: Draft) -> None:
    _, task = drafted(topic=TEXTS, label=repeated(["good", "bad"]), lang=repeated(["en", "de"]))
    assert (task.inputs.text, task.inputs.label) == (["topic"], "label")


@pytest.mark.parametrize("name", ["mask", "the {text}", "text}", "", "p_good", *OWN_COLUMNS])
def test_text_column_whose_name_no_task_can_have_is_refused(name: str, write_parquet: WriteParquet) -> None:
    file = write_parquet({name: TEXTS, "class": repeated(["good", "bad"])})
    with pytest.raises(InputError, match="the text column can't be called") as caught:
        starter_task(file)
    assert repr(name) in str(caught.value)
    assert "fix: rename the column" in str(caught.value)
    assert str(file) in str(caught.value)


def test_file_of_one_row_is_no_label(drafted: Draft) -> None:
    text, task = drafted(text=TEXTS[:1], label=["good"])
    assert (task.inputs.labelled, task.inputs.id) == (None, None)
    assert '"label" is not taken for the label' in text


# ---- drafts that check takes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a/b", "b/b"], {"a/b": "a/b", "b/b": "b/b"}),
        (["a/b", "b/b", "b"], {"a/b": "a/b", "b": "b", "b/b": "b/b"}),
        (["Good", "good", "bad"], {"Good": "Good", "bad": "bad", "good": "good 2"}),
        (["caf\xe9", "cafe"], {"cafe": "cafe", "caf\xe9": "caf\xe9 2"}),
        (["very_good", "very-good", "very  good"], None),
        (["x/1", "1", "1 "], None),
    ],
    ids=str,
)
def test_labels_of_one_word_get_words_that_differ(
    labels: list[str], words: dict[str, str] | None, drafted: Draft
) -> None:
    text, task = drafted(text=TEXTS, label=repeated(labels))
    check_task(task)
    assert task.label_names == sorted(labels)
    assert words is None or task.labels == {label: [word] for label, word in words.items()}
    unmarked = [line for line in text.splitlines() if line.startswith('  "') and "TODO" not in line]
    assert len(unmarked) <= len(labels) - 2


@pytest.mark.parametrize("empty", ["", " ", None])
def test_empty_label_is_left_out_and_told(empty: str | None, drafted: Draft) -> None:
    text, task = drafted(text=TEXTS, label=repeated(["good", empty, "bad"]))
    assert task.labels == {"bad": ["bad"], "good": ["good"]}
    assert 'TODO: some rows have no "label", or an empty one' in text
    with pytest.raises(InputError, match=r"has (no|the unknown) label"):
        check_task(task)


@pytest.mark.parametrize(
    "odd", ["\n", "\x7f", "\x85", "\u2028", "\ufeff", "\x1b", "#", ": ", '"', "\\", "\U0001f469\u200d\U0001f680"]
)
def test_names_with_odd_characters_are_read_back_as_they_were(odd: str, drafted: Draft) -> None:
    names = {f"{what}{odd}x": what for what in ("text", "label", "id", "other", "class")}
    text_column, label, identifier, other, second = names
    labels = [f"good{odd}good", f"bad{odd}bad"]
    text, task = drafted(
        **{
            text_column: TEXTS,
            label: repeated(labels),
            identifier: pa.array(range(12)),
            other: repeated([0.5]),
            second: repeated([0.5]),
        }
    )
    assert (task.inputs.text, task.inputs.label, task.inputs.id) == ([text_column], label, identifier)
    assert task.label_names == sorted(labels)
    assert all(line.isprintable() for line in text.splitlines())


def test_draft_of_plain_labels_has_nothing_to_do_but_the_rows_to_label(write_parquet: WriteParquet) -> None:
    file = write_parquet({"text": TEXTS, "label": repeated(["Sci/Tech", "World News", "so_so"])})
    text = starter_task(file, relative_to=file.parent)
    assert [line for line in text.splitlines() if "TODO" in line] == [
        '  unlabelled: "unlabelled/*.parquet"  # TODO: the rows to label'
    ]
    assert all(json.dumps([word]) in text for word in ("tech", "world news", "so so"))
