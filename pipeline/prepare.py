"""The view over all files at once: which ids repeat between them, which rows are left out.

What it finds is small (a row number and an id for each repeated or excluded row), so that the files' own
artifacts stay as they are when another file joins them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import tables
from pipeline.errors import InputError
from pipeline.progress import Progress, told
from pipeline.ragged import Numbers, offsets_of
from pipeline.repeats import find_repeats, gather, hashes_of_hex, hashes_of_texts, hex_of
from pipeline.tables import Rows

_RENAMES = pa.schema([("shard", pa.int64()), ("row", pa.int64()), ("row_id", pa.string())])
_EXCLUDED = pa.schema([("shard", pa.int64()), ("row", pa.int64())])


def prepare_rows(
    shards: Sequence[Rows],
    sets: Mapping[str, Rows],
    out: Path,
    *,
    names: Sequence[str],
    given_ids: bool,
    forgotten: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Write ``renames.parquet`` (shard, row, row_id) and ``excluded.parquet`` (shard, row).

    Args:
        shards: the unlabelled files, in order.
        sets: ``labelled`` and ``test``, where they are.
        out: a directory.
        names: the files' names, for messages.
        given_ids: whether ids come from the user's column; then a repeated one is an error.
        forgotten: the content hashes of texts that are left out as labelled ones are.
        progress: called with rows read, twice each, and how often rows are read in all.

    Returns:
        Counts.

    Raises:
        InputError: two files hold the same id, or every test row has a labelled row's text.

    What grows with the rows lies in nameless files below ``out`` while this runs: 24 bytes a row.
    """
    offsets = offsets_of([rows.count for rows in shards])
    pool = int(offsets[-1])
    read = partial(told, progress=progress, total=2 * pool)
    if given_ids:
        _refuse_repeated_ids(shards, names, out, read)
        tables.write_table(out / "renames.parquet", _RENAMES.empty_table())
        renamed = 0
    else:
        renamed = _write_renames(shards, offsets, out, read)
    known = {name: np.unique(hashes_of_hex(rows.read(["content_hash"]).column(0))) for name, rows in sets.items()}
    if forgotten:
        known["forgotten"] = hashes_of_hex(pa.array(forgotten, pa.string()))
    counts = {f"{name}_in_pool": 0 for name in known}
    with tables.parquet_writer(out / "excluded.parquet", _EXCLUDED) as writer:
        for number, rows in enumerate(shards):
            start = 0
            for hashes in read(rows.content_hashes(), start=pool + int(offsets[number])):
                left_out = np.zeros(len(hashes), dtype=np.bool_)
                for name, contents in known.items():
                    mine = np.isin(hashes, contents)
                    counts[f"{name}_in_pool"] += int(mine.sum())
                    if name != "test":
                        left_out |= mine
                at = np.flatnonzero(left_out)
                if len(at):
                    writer.write_batch(pa.record_batch([np.full(len(at), number), at + start], schema=_EXCLUDED))
                start += len(hashes)
    overlap = 0
    if len(sets) == 2:
        overlap = int(np.isin(hashes_of_hex(sets["test"].read(["content_hash"]).column(0)), known["labelled"]).sum())
        if overlap == sets["test"].count > 0:
            raise InputError(
                "every test row is a labelled row",
                where="inputs.test",
                fix="give rows that are not in inputs.labelled, or leave it out: annotators are cross-validated anyway",
            )
    return {"rows": pool, "renamed": renamed, "labelled_in_test": overlap, **counts}


def _write_renames(shards: Sequence[Rows], offsets: Numbers, out: Path, read: Callable[..., Iterator[Any]]) -> int:
    """New ids for rows whose text an earlier file holds too: the occurrence counter goes on across files."""
    every = (hashes for rows in shards for hashes in rows.content_hashes())
    contents = gather(read(every), out)
    overall = find_repeats(contents, out)
    renamed = 0
    with tables.parquet_writer(out / "renames.parquet", _RENAMES) as writer:
        for number, (start, stop) in enumerate(pairwise(offsets)):
            if number == 0:
                continue  # nothing comes before
            within = find_repeats(contents[start:stop], out).occurrence
            for at in range(0, int(stop - start), tables.BATCH_ROWS):
                here = slice(start + at, min(start + at + tables.BATCH_ROWS, stop))
                rows = np.flatnonzero(overall.occurrence[here] != within[at : at + tables.BATCH_ROWS])
                if len(rows):
                    values, counts = contents[here][rows].tolist(), overall.occurrence[here][rows].tolist()
                    ids = [f"{hex_of(value)}-{count}" for value, count in zip(values, counts, strict=True)]
                    columns = [np.full(len(rows), number), rows + at, pa.array(ids, pa.string())]
                    writer.write_batch(pa.record_batch(columns, schema=_RENAMES))
                    renamed += len(rows)
    return renamed


def _refuse_repeated_ids(
    shards: Sequence[Rows], names: Sequence[str], out: Path, read: Callable[..., Iterator[Any]]
) -> None:
    ids = (batch.column(0).to_pylist() for rows in shards for batch in rows.batches(["row_id"]))
    found = find_repeats(gather(map(hashes_of_texts, read(ids)), out), out)
    if not found.groups:
        return
    seen: dict[str, int] = {}
    start = 0
    for number, rows in enumerate(shards):
        for batch in rows.batches(["row_id"]):
            suspects = np.flatnonzero(found.group[start : start + batch.num_rows] >= 0)
            start += batch.num_rows
            for row_id in batch.column(0).take(pa.array(suspects)).to_pylist():
                if row_id in seen:  # compared as text: two ids with one hash are not the same id
                    raise InputError(
                        f"the id {row_id!r} is in {names[seen[row_id]]} and in {names[number]}",
                        where="inputs.unlabelled",
                        fix="make ids unique over all files, or leave inputs.id out: ids are then made from the text",
                    )
                seen[row_id] = number


class Renames:
    """The new ids of one shard's rows.

    Args:
        prepared: the directory of the prepare stage's artifact.
        shard: the shard's number.
    """

    def __init__(self, prepared: Path, shard: int) -> None:
        table = pq.read_table(prepared / "renames.parquet", filters=[("shard", "=", shard)])
        self._rows = table.column("row").to_numpy()
        self._ids = table.column("row_id").combine_chunks()

    def apply(self, ids: pa.Array, start: int) -> pa.Array:
        """The ids of rows ``start`` and on, renamed."""
        first, last = np.searchsorted(self._rows, [start, start + len(ids)])
        if first == last:
            return ids
        changed = np.zeros(len(ids), dtype=np.bool_)
        changed[self._rows[first:last] - start] = True
        return pc.replace_with_mask(ids, pa.array(changed), self._ids[first:last])


def excluded_rows(prepared: Path, shard: int) -> Numbers:
    """The rows of a shard that are labelled already, or hold a forgotten text, ascending."""
    table = pq.read_table(prepared / "excluded.parquet", filters=[("shard", "=", shard)])
    rows: Numbers = table.column("row").to_numpy()
    return rows
