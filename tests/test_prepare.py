"""The view over all files: ids that repeat, rows that are labelled already."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.prepare import Renames, excluded_rows, prepare_rows
from pipeline.tables import ColumnRoles, Rows, content_hash, ingest


def shard(root: Path, name: str, texts: Sequence[str], ids: Sequence[str] | None = None) -> Rows:
    """A user's file, as the ingest stage leaves it."""
    out = root / name
    out.mkdir()
    columns: dict[str, Any] = {"text": pa.array(texts, pa.string())}
    if ids is not None:
        columns["key"] = pa.array(ids, pa.string())
    pq.write_table(pa.table(columns), out / "user.parquet")
    ingest(out / "user.parquet", ColumnRoles(("text",), "key" if ids is not None else None), out)
    return Rows(out)


def prepare(
    root: Path, shards: Sequence[Rows], *, given_ids: bool = False, forgotten: Sequence[str] = (), **sets: Rows
) -> dict[str, Any]:
    names = [f"file-{i}.parquet" for i in range(len(shards))]
    return prepare_rows(shards, sets, root, names=names, given_ids=given_ids, forgotten=forgotten)


def final_ids(root: Path, shards: Sequence[Rows]) -> list[list[str]]:
    """The ids of all rows, renames applied."""
    found = []
    for number, rows in enumerate(shards):
        ids = rows.read(["row_id"]).column(0).combine_chunks()
        renames = Renames(root, number)
        found.append([row_id for at in range(len(ids)) for row_id in renames.apply(ids[at : at + 1], at).to_pylist()])
        assert renames.apply(ids, 0).to_pylist() == found[-1]
    return found


files = st.lists(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=6), min_size=1, max_size=4)


@given(files)
def test_ids_made_from_the_text_are_unique_over_all_files(texts: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shards = [shard(root, str(i), part) for i, part in enumerate(texts)]
        counts = prepare(root, shards)
        ids = [row_id for part in final_ids(root, shards) for row_id in part]
    assert len(set(ids)) == len(ids) == counts["rows"]
    earlier: set[str] = set()
    renamed = 0
    for part in texts:
        renamed += sum(text in earlier for text in part)
        earlier |= set(part)
    assert counts["renamed"] == renamed


def test_a_file_that_joins_renames_its_own_rows_alone(tmp_path: Path) -> None:
    old = [shard(tmp_path, "one", ["a", "b", "a"]), shard(tmp_path, "two", ["b", "c"])]
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    prepare(tmp_path / "before", old)
    before = final_ids(tmp_path / "before", old)
    new = [*old, shard(tmp_path, "three", ["c", "a", "d", "a"])]
    prepare(tmp_path / "after", new)
    after = final_ids(tmp_path / "after", new)
    assert after[:2] == before
    (hash_a, hash_b, second_a), (second_b, hash_c) = before
    assert (second_a, second_b) == (f"{hash_a}-2", f"{hash_b}-2")
    assert [after[2][0], after[2][1], after[2][3]] == [f"{hash_c}-2", f"{hash_a}-3", f"{hash_a}-4"]


def test_rows_that_are_labelled_already_are_excluded_wherever_they_stand(tmp_path: Path) -> None:
    shards = [shard(tmp_path, "one", ["a", "b", "a"]), shard(tmp_path, "two", ["c", "b"])]
    counts = prepare(tmp_path, shards, labelled=shard(tmp_path, "labelled", ["a", "b", "z"]))
    excluded = pq.read_table(tmp_path / "excluded.parquet").to_pylist()
    assert [(row["shard"], row["row"]) for row in excluded] == [(0, 0), (0, 1), (0, 2), (1, 1)]
    assert [excluded_rows(tmp_path, number).tolist() for number in (0, 1)] == [[0, 1, 2], [1]]
    assert counts["labelled_in_pool"] == 4


def test_rows_with_a_forgotten_text_are_excluded_as_labelled_ones_are_and_once(tmp_path: Path) -> None:
    shards = [shard(tmp_path, "one", ["a", "b", "c"]), shard(tmp_path, "two", ["c", "b"])]
    forgotten = [content_hash([text]) for text in ("c", "a", "nowhere")]
    counts = prepare(tmp_path, shards, labelled=shard(tmp_path, "labelled", ["a"]), forgotten=forgotten)
    assert [excluded_rows(tmp_path, number).tolist() for number in (0, 1)] == [[0, 2], [0]]
    assert (counts["labelled_in_pool"], counts["forgotten_in_pool"]) == (1, 3)


def test_test_rows_in_the_pool_are_counted_and_stay(tmp_path: Path) -> None:
    shards = [shard(tmp_path, "one", ["a", "b", "c"])]
    sets = {"labelled": shard(tmp_path, "labelled", ["x", "a"]), "test": shard(tmp_path, "test", ["b", "c", "a"])}
    counts = prepare(tmp_path, shards, **sets)
    assert counts == {"rows": 3, "renamed": 0, "labelled_in_test": 1, "labelled_in_pool": 1, "test_in_pool": 3}
    assert pq.read_table(tmp_path / "excluded.parquet").column("row").to_pylist() == [0]


def test_a_test_file_of_labelled_rows_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every test row is a labelled row"):
        prepare(
            tmp_path,
            [shard(tmp_path, "pool", ["a", "b"])],
            labelled=shard(tmp_path, "labelled", ["x", "y"]),
            test=shard(tmp_path, "test", ["y", "x", "x"]),
        )


def test_an_id_in_two_files_is_told_with_both(tmp_path: Path) -> None:
    shards = [shard(tmp_path, "one", ["a", "b"], ["k1", "k2"]), shard(tmp_path, "two", ["c"], ["k2"])]
    with pytest.raises(InputError, match=r"the id 'k2' is in file-0\.parquet and in file-1\.parquet"):
        prepare(tmp_path, shards, given_ids=True)


def test_given_ids_are_never_renamed(tmp_path: Path) -> None:
    shards = [shard(tmp_path, "one", ["a", "a"], ["k1", "k2"]), shard(tmp_path, "two", ["a"], ["k3"])]
    assert prepare(tmp_path, shards, given_ids=True)["renamed"] == 0
    assert final_ids(tmp_path, shards) == [["k1", "k2"], ["k3"]]


def test_files_without_rows_are_fine(tmp_path: Path) -> None:
    shards = [shard(tmp_path, "one", []), shard(tmp_path, "two", ["a"])]
    assert prepare(tmp_path, shards, labelled=shard(tmp_path, "labelled", []))["rows"] == 1
