"""Parquet in and out: what a user's file may hold, and what is told of its mistakes."""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline import tables
from pipeline.errors import InputError
from pipeline.tables import ColumnRoles, Rows, content_hash, from_lists, ingest, texts_of, to_lists

TEXT = ColumnRoles(("text",))
LABELS = ["good", "bad"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.fixture
def refusal(out: Path) -> Callable[..., str]:
    """The message with which a file is refused."""

    def refuse(path: Path, roles: ColumnRoles = TEXT, **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            ingest(path, roles, out, **options)
        assert str(path) in str(caught.value)
        return str(caught.value)

    return refuse


WriteParquet = Callable[..., Path]


def texts_in(out: Path, column: str = "text") -> list[str]:
    return texts_of(Rows(out).read())[column]


# ---- column types --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_every_kind_of_text_column_is_read_as_the_same_rows(
    kind: pa.DataType, out: Path, write_parquet: WriteParquet
) -> None:
    texts = ["good food", "bad food", "good food", "caf\u00e9 \N{SNOWMAN}"]
    found = ingest(write_parquet({"text": pa.array(texts, pa.string()).cast(kind)}), TEXT, out)
    rows = Rows(out).read()
    assert texts_in(out) == texts
    assert rows.schema.field("text.text").type == pa.string()
    assert rows.column("content_hash").to_pylist() == [content_hash([text]) for text in texts]
    assert vars(found) == {"rows": 4, "quarantined": 0}


@pytest.mark.parametrize("kind", [pa.int64(), pa.binary(), pa.list_(pa.string())], ids=str)
def test_a_text_column_that_holds_no_text_is_refused(
    kind: pa.DataType, refusal: Callable[..., str], write_parquet: WriteParquet
) -> None:
    told = refusal(write_parquet({"text": pa.array([None, None], kind)}))
    assert "the column 'text' holds" in told
    assert "not text" in told


def test_carried_columns_stay_as_they_are_nested_ones_too(out: Path, write_parquet: WriteParquet) -> None:
    carried = {
        "tags": pa.array([["a", "b"], [], None]),
        "place": pa.array([{"city": "Bonn", "at": [1.5, 2.5]}, {"city": None, "at": None}, None]),
        "when": pa.array([0, 1, None], pa.timestamp("us", tz="UTC")),
        "shop": pa.array(["north", None, "south"]).dictionary_encode(),
        "view": pa.array(["x", None, "y"], pa.string_view()),
        "text.": pa.array([1, 2, 3]),
    }
    path = write_parquet({"text": ["one", "two", "three"], **carried})
    ingest(path, ColumnRoles(("text",), carry=tuple(carried)), out)
    rows = Rows(out).read()
    for name, values in carried.items():
        assert rows.column(f"carry.{name}").to_pylist() == values.to_pylist()
    for name in ("tags", "place", "when"):
        assert rows.schema.field(f"carry.{name}").type == carried[name].type
    assert rows.schema.field("carry.shop").type == pa.string()  # decoded: `datasets` reads no dictionaries
    assert rows.schema.field("carry.view").type == pa.string()


def test_a_column_may_be_named_like_the_librarys_own(out: Path, write_parquet: WriteParquet) -> None:
    path = write_parquet({"row_id": ["some text", "more text"], "content_hash": [1, 2], "label": ["x", "y"]})
    ingest(path, ColumnRoles(("row_id",), carry=("content_hash", "label")), out)
    rows = Rows(out).read()
    assert texts_in(out, "row_id") == ["some text", "more text"]
    assert rows.column("carry.content_hash").to_pylist() == [1, 2]
    assert rows.column("carry.label").to_pylist() == ["x", "y"]


def test_a_missing_column_is_told_with_those_that_are_there(
    refusal: Callable[..., str], write_parquet: WriteParquet
) -> None:
    path = write_parquet({"body": ["good"], "stars": [5]})
    for roles in (TEXT, ColumnRoles(("body",), id="text"), ColumnRoles(("body",), carry=("text",))):
        told = refusal(path, roles)
        assert "there is no column 'text'" in told
        assert "the file has: body, stars" in told


# ---- files that are none -------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_told(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nothing.parquet")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_or_empty_file_is_told(
    keep: float, refusal: Callable[..., str], write_parquet: WriteParquet
) -> None:
    path = write_parquet({"text": [f"row {i}" for i in range(1000)]})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert "can't read this as Parquet" in refusal(path)


def test_text_instead_of_parquet_is_told(refusal: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("text,label\ngood,1\n" * 100)
    assert "can't read this as Parquet" in refusal(path)


def test_damage_behind_a_whole_footer_is_told(refusal: Callable[..., str], write_parquet: WriteParquet) -> None:
    path = write_parquet({"text": [f"row {i * 7919 % 1000}" for i in range(1000)]})
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    assert "can't read this Parquet to its end" in refusal(path)


def test_a_file_without_rows_gives_no_rows(out: Path, write_parquet: WriteParquet) -> None:
    path = write_parquet({"text": pa.array([], pa.string()), "shop": pa.array([], pa.string()).dictionary_encode()})
    assert ingest(path, ColumnRoles(("text",), carry=("shop",)), out).rows == 0
    assert Rows(out).count == 0
    assert texts_in(out) == []


# ---- rows without text ---------------------------------------------------------------------------------

BLANKS = ["good", None, "bad", "", " \t\n\u00a0", "fine"]


def test_rows_without_text_stop_the_run_unless_told_otherwise(
    refusal: Callable[..., str], write_parquet: WriteParquet
) -> None:
    told = refusal(write_parquet({"text": BLANKS}))
    assert "row 1 has no text (3 such rows" in told
    assert "on_bad_rows: quarantine" in told


def test_rows_without_text_are_set_aside_with_their_number_and_reason(out: Path, write_parquet: WriteParquet) -> None:
    found = ingest(
        write_parquet({"text": BLANKS, "key": list("abcdef")}), ColumnRoles(("text",), "key"), out, quarantine=True
    )
    assert texts_in(out) == ["good", "bad", "fine"]
    assert Rows(out).read().column("row_id").to_pylist() == ["a", "c", "f"]
    aside = pq.read_table(out / "quarantine.parquet").to_pylist()
    assert aside == [{"row": i, "reason": "no text", "text": BLANKS[i]} for i in (1, 3, 4)]
    assert (found.rows, found.quarantined) == (3, 3)


def test_a_row_with_text_in_one_of_two_columns_is_kept(out: Path, write_parquet: WriteParquet) -> None:
    path = write_parquet({"title": ["a", None, " ", None], "body": [None, "b", "c", ""]})
    ingest(path, ColumnRoles(("title", "body")), out, quarantine=True)
    assert texts_in(out, "title") == ["a", "", " "]
    assert texts_in(out, "body") == ["", "b", "c"]


def test_numbers_of_rows_go_on_over_batches(refusal: Callable[..., str], write_parquet: WriteParquet) -> None:
    texts: list[str | None] = [f"row {i}" for i in range(tables.BATCH_ROWS + 10)]
    keys = list(map(str, range(len(texts))))
    keys[-1] = keys[3]
    told = refusal(write_parquet({"text": texts, "key": keys}), ColumnRoles(("text",), "key"))
    assert f"row {len(texts) - 1} has the id '3', as row 3 has" in told
    texts[-2] = None
    assert f"row {len(texts) - 2} has no text" in refusal(write_parquet({"text": texts}))


def test_a_text_that_spells_special_tokens_is_kept_as_it_is(out: Path, write_parquet: WriteParquet) -> None:
    texts = ["[MASK] was [SEP] good", "{text} {mask}", "</s><mask>", "a\x00b\x1fc", "=1+1"]
    ingest(write_parquet({"text": texts}), TEXT, out)
    assert texts_in(out) == texts


# ---- ids -----------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["good", "bad", "good ", "cafe\u0301", "caf\u00e9"]), min_size=1, max_size=30))
def test_ids_made_from_the_text_are_unique_and_the_same_each_time(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        pq.write_table(pa.table({"text": texts}), out / "user.parquet")
        ingest(out / "user.parquet", TEXT, out)
        rows = Rows(out).read()
        ingest(out / "user.parquet", TEXT, out)
        assert Rows(out).read().equals(rows)
    ids = rows.column("row_id").to_pylist()
    assert len(set(ids)) == len(texts)
    distinct = {unicodedata.normalize("NFC", text) for text in texts}
    assert len(set(rows.column("content_hash").to_pylist())) == len(distinct)


@given(st.lists(st.text(max_size=6), min_size=1, max_size=4))
def test_composed_and_decomposed_text_hash_alike(texts: list[str]) -> None:
    composed, decomposed = ([unicodedata.normalize(form, text) for text in texts] for form in ("NFC", "NFD"))
    assert content_hash(composed) == content_hash(decomposed)
    assert len(content_hash(texts)) == 16


def test_the_same_words_in_other_columns_are_other_content() -> None:
    assert len({content_hash(row) for row in (["ab", ""], ["a", "b"], ["", "ab"], ["ab"], ["b", "a"])}) == 5


def test_a_repeated_id_is_told_with_both_rows(refusal: Callable[..., str], write_parquet: WriteParquet) -> None:
    told = refusal(write_parquet({"text": ["a", "b", "c"], "key": [7, 8, 7]}), ColumnRoles(("text",), "key"))
    assert "row 2 has the id '7', as row 0 has" in told


def test_a_missing_id_is_told(refusal: Callable[..., str], write_parquet: WriteParquet) -> None:
    told = refusal(write_parquet({"text": ["a", "b"], "key": ["x", None]}), ColumnRoles(("text",), "key"))
    assert "row 1 has no id" in told


def test_ids_of_any_type_become_text(out: Path, write_parquet: WriteParquet) -> None:
    for keys in (
        pa.array([1, 22]),
        pa.array(["1", "22"]).dictionary_encode(),
        pa.array(["1", "22"], pa.large_string()),
    ):
        ingest(write_parquet({"text": ["a", "b"], "key": keys}), ColumnRoles(("text",), "key"), out)
        assert Rows(out).read().column("row_id").to_pylist() == ["1", "22"]


# ---- labels --------------------------------------------------------------------------------------------

LABELLED = ColumnRoles(("text",), label="label")


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["bad", "good", "bad"]),
        pa.array(["bad", "good", "bad"], pa.large_string()),
        pa.array(["bad", "good", "bad"]).dictionary_encode(),
    ],
    ids=lambda labels: str(labels.type),
)
def test_labels_become_their_number_in_the_task(labels: pa.Array, out: Path, write_parquet: WriteParquet) -> None:
    ingest(write_parquet({"text": ["a", "b", "c"], "label": labels}), LABELLED, out, label_names=LABELS)
    assert Rows(out).read().column("label").to_pylist() == [1, 0, 1]


def test_numbers_are_labels_when_the_task_names_them_so(out: Path, write_parquet: WriteParquet) -> None:
    ingest(write_parquet({"text": ["a", "b"], "label": [4, 1]}), LABELLED, out, label_names=["1", "4"])
    assert Rows(out).read().column("label").to_pylist() == [1, 0]


@pytest.fixture
def class_labels(tmp_path: Path) -> Callable[[list[int | None]], Path]:
    """A file as `datasets` writes it: numbers, with their names in the footer."""

    def write(labels: list[int | None]) -> Path:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
        )
        rows = datasets.Dataset.from_dict(
            {"text": [f"row {i}" for i in range(len(labels))], "label": labels}, features=features
        )
        rows.to_parquet(str(tmp_path / "classes.parquet"))
        return tmp_path / "classes.parquet"

    return write


def test_class_labels_are_read_by_their_names_not_their_numbers(
    class_labels: Callable[[list[int | None]], Path], out: Path
) -> None:
    path = class_labels([0, 1, 1])
    assert pq.read_schema(path).field("label").type == pa.int64()
    ingest(path, LABELLED, out, label_names=LABELS)
    assert Rows(out).read().column("label").to_pylist() == [1, 0, 0]
    assert tables.label_names_in(pq.ParquetFile(path), "label", "") == {"bad": 0, "good": 1}


@pytest.mark.parametrize("nothing", [-1, None])
def test_a_class_label_that_names_nothing_is_no_label(
    nothing: int | None,
    class_labels: Callable[[list[int | None]], Path],
    refusal: Callable[..., str],
) -> None:
    assert "row 1 has no label" in refusal(class_labels([0, nothing]), LABELLED, label_names=LABELS)


def test_a_class_label_beyond_the_names_is_an_unknown_label(
    class_labels: Callable[[list[int | None]], Path], refusal: Callable[..., str]
) -> None:
    path = class_labels([0, 1])
    schema = pq.read_schema(path)
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 2]}).cast(schema), path)
    assert "row 1 has the unknown label '2'" in refusal(path, LABELLED, label_names=LABELS)


def test_a_column_that_is_there_twice_is_told(refusal: Callable[..., str], tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.table(columns, names=["text", "text"]), tmp_path / "twice.parquet")
    assert "the column 'text' is there twice" in refusal(tmp_path / "twice.parquet", ColumnRoles(("text",)))


def test_what_is_no_parquet_is_told_with_what_to_do_about_it(tmp_path: Path, write_parquet: WriteParquet) -> None:
    def told(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            tables.open_parquet(path)
        return str(caught.value)

    table = tmp_path / "rows.csv"
    table.write_text("text\ngood\n")
    assert "convert it to Parquet" in told(table)
    assert f"name its files: {tmp_path}/*.parquet" in told(tmp_path)
    half = write_parquet({"text": ["a"] * 100})
    half.write_bytes(half.read_bytes()[:100])
    assert "it may be truncated" in told(half)


def test_an_unknown_label_is_told_with_its_row_and_the_tasks_labels(
    refusal: Callable[..., str], write_parquet: WriteParquet
) -> None:
    told = refusal(write_parquet({"text": ["a", "b"], "label": ["good", "Bad"]}), LABELLED, label_names=LABELS)
    assert "row 1 has the unknown label 'Bad'" in told
    assert "the task's labels are: good, bad" in told


def test_a_row_without_a_label_is_told(refusal: Callable[..., str], write_parquet: WriteParquet) -> None:
    told = refusal(write_parquet({"text": ["a", "b"], "label": ["good", None]}), LABELLED, label_names=LABELS)
    assert "row 1 has no label" in told


def test_a_quarantined_row_needs_no_label(out: Path, write_parquet: WriteParquet) -> None:
    path = write_parquet({"text": [None, "b"], "label": [None, "good"]})
    ingest(path, LABELLED, out, label_names=LABELS, quarantine=True)
    assert Rows(out).read().column("label").to_pylist() == [0]


# ---- distributions as columns --------------------------------------------------------------------------

scores = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 40), st.integers(1, 7)),
    elements=st.floats(width=32, allow_nan=False),
)


@given(scores, st.integers(1, 9))
def test_distributions_come_back_from_parquet_bit_for_bit(values: np.ndarray, chunk: int) -> None:
    column = to_lists(values)
    assert column.type == pa.list_(pa.float32(), values.shape[1])
    assert np.array_equal(from_lists(column), values)
    parts = [column[at : at + chunk] for at in range(0, len(column), chunk)]
    assert np.array_equal(from_lists(pa.chunked_array(parts, column.type)), values)
    with tempfile.TemporaryDirectory() as folder:
        tables.write_table(Path(folder) / "scores.parquet", pa.table({"scores": column}))
        read = pq.read_table(Path(folder) / "scores.parquet").column(0)
    assert np.array_equal(from_lists(read), values)


def test_a_slice_of_distributions_is_those_rows_alone() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert np.array_equal(from_lists(to_lists(values).slice(1, 2)), values[1:3])


def test_batches_hold_all_rows_in_order(out: Path, write_parquet: WriteParquet) -> None:
    texts = [f"row {i}" for i in range(2 * tables.BATCH_ROWS + 5)]
    ingest(write_parquet({"text": texts}), TEXT, out)
    batches = list(Rows(out).batches(["text.text"]))
    assert [text for batch in batches for text in texts_of(batch)["text"]] == texts
    assert max(batch.num_rows for batch in batches) <= tables.BATCH_ROWS
    assert Rows(out).count == len(texts)
