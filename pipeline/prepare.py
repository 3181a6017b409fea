"""The view over all files at once: which ids repeat between them, which rows are labelled already.

What it finds is small (a row number and an id for each repeated or excluded row), so that the files' own
artifacts stay as they are when another file joins them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import tables
from pipeline.errors import InputError
from pipeline.tables import Rows

Hashes = npt.NDArray[np.uint64]


def prepare_rows(
    shards: Sequence[Rows], sets: Mapping[str, Rows], out: Path, *, names: Sequence[str], given_ids: bool
) -> dict[str, Any]:
    """Write ``renames.parquet`` (shard, row, row_id) and ``excluded.parquet`` (shard, row).

    Args:
        shards: the unlabelled files, in order.
        sets: ``labelled`` and ``test``, where they are.
        out: a directory.
        names: the files' names, for messages.
        given_ids: whether ids come from the user's column; then a repeated one is an error.

    Returns:
        Counts.

    Raises:
        InputError: two files hold the same id.

    Memory: 8 bytes a row.
    """
    contents = [_content_hashes(rows) for rows in shards]
    if given_ids:
        _refuse_repeated_ids(shards, names)
        renamed: list[tuple[int, int, str]] = []
    else:
        renamed = _renames(shards, contents)
    excluded = [np.zeros(0, dtype=np.int64) for _ in shards]
    counts = {}
    for name, rows in sets.items():
        known = np.unique(_content_hashes(rows))
        at = [np.flatnonzero(np.isin(content, known)) for content in contents]
        counts[f"{name}_in_pool"] = int(sum(len(rows_at) for rows_at in at))
        if name == "labelled":
            excluded = at
    overlap = (
        int(np.isin(_content_hashes(sets["test"]), _content_hashes(sets["labelled"])).sum()) if len(sets) == 2 else 0
    )
    renames = pa.table(
        {
            "shard": pa.array([shard for shard, _, _ in renamed], pa.int64()),
            "row": pa.array([row for _, row, _ in renamed], pa.int64()),
            "row_id": pa.array([row_id for _, _, row_id in renamed], pa.string()),
        }
    )
    tables.write_table(out / "renames.parquet", renames)
    numbers = np.concatenate([np.full(len(rows_at), i) for i, rows_at in enumerate(excluded)])
    tables.write_table(
        out / "excluded.parquet",
        pa.table({"shard": pa.array(numbers, pa.int64()), "row": pa.array(np.concatenate(excluded), pa.int64())}),
    )
    rows_in_all = int(sum(len(content) for content in contents))
    return {"rows": rows_in_all, "renamed": len(renamed), "labelled_in_test": overlap, **counts}


def _content_hashes(rows: Rows) -> Hashes:
    parts = [
        np.fromiter((int(value, 16) for value in batch.column(0).to_pylist()), np.uint64, batch.num_rows)
        for batch in rows.batches(["content_hash"])
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def _renames(shards: Sequence[Rows], contents: Sequence[Hashes]) -> list[tuple[int, int, str]]:
    """New ids for rows whose text an earlier file holds too: the occurrence counter goes on across files."""
    distinct, counts = np.unique(np.concatenate([np.unique(content) for content in contents]), return_counts=True)
    shared = distinct[counts > 1]
    before: dict[int, int] = {}
    renamed = []
    for number, (rows, content) in enumerate(zip(shards, contents, strict=True)):
        at = np.flatnonzero(np.isin(content, shared))
        if len(at) == 0:
            continue
        hashes = rows.take(at, ["content_hash"]).column(0).to_pylist()
        here: dict[int, int] = {}
        for row, text in zip(at, hashes, strict=True):
            value = int(content[row])
            here[value] = here.get(value, 0) + 1
            if value in before:
                renamed.append((number, int(row), f"{text}-{before[value] + here[value]}"))
        for value, count in here.items():
            before[value] = before.get(value, 0) + count
    return renamed


def _refuse_repeated_ids(shards: Sequence[Rows], names: Sequence[str]) -> None:
    hashed = [
        np.fromiter(
            (
                int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest())
                for batch in rows.batches(["row_id"])
                for value in batch.column(0).to_pylist()
            ),
            np.uint64,
        )
        for rows in shards
    ]
    distinct, counts = np.unique(np.concatenate(hashed), return_counts=True)
    repeated = distinct[counts > 1]
    seen: dict[str, int] = {}
    for number, (rows, values) in enumerate(zip(shards, hashed, strict=True)):
        at = np.flatnonzero(np.isin(values, repeated))
        for row_id in rows.take(at, ["row_id"]).column(0).to_pylist():
            if row_id in seen:  # compared as text: two ids with one hash are not the same id
                raise InputError(
                    f"the id {row_id!r} is in {names[seen[row_id]]} and in {names[number]}",
                    where="inputs.unlabelled",
                    fix="make ids unique over all files, or leave inputs.id out: ids are then made from the text",
                )
            seen[row_id] = number


def renames_of(prepared: Path, shard: int) -> dict[int, str]:
    """The new ids of one shard's rows, by row number."""
    import pyarrow.parquet as pq

    table = pq.read_table(prepared / "renames.parquet")
    mine = table.filter(pc.equal(table.column("shard"), shard))
    return dict(zip(mine.column("row").to_pylist(), mine.column("row_id").to_pylist(), strict=True))
