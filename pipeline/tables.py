"""Parquet in and out: row ids, content hashes, streaming batches, one writer.

Rows travel between stages as Parquet with the columns of `rows_schema`: a row id, a content hash of the shown
text, the text columns and the columns carried along, each under its own name with a prefix, so that a user's
column may be called whatever it likes.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.locations import filesystem, local_path, translated
from pipeline.progress import Progress, told
from pipeline.repeats import Hashes, find_repeats, gather, hashes_of_hex, hashes_of_texts

TEXT, CARRY = "text.", "carry."
BATCH_ROWS = 10_000
Floats = npt.NDArray[np.float32]


def parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer, itself a context, with the settings used everywhere: zstd, pages with an index."""
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_index=True)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table in one go."""
    with parquet_writer(path, table.schema) as writer:
        writer.write_table(table, row_group_size=BATCH_ROWS)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a user's Parquet file.

    Raises:
        InputError: it is missing, empty, truncated or no Parquet at all.
    """
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise InputError("the file does not exist", where=str(path)) from None
    except (pa.ArrowException, OSError) as error:
        if path.is_dir():
            raise InputError("this is a directory", where=str(path), fix=f"name its files: {path}/*.parquet") from None
        fix = "write it again; it may be truncated" if _begins_as_parquet(path) else "convert it to Parquet"
        raise InputError(f"can't read this as Parquet: {error}", where=str(path), fix=fix) from None


def _begins_as_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"PAR1", b"")
    except OSError:
        return True


def batches_of(
    file: pq.ParquetFile, columns: list[str] | None, where: str, rows: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """The rows of a user's file.

    Raises:
        InputError: it is damaged behind its footer, or holds text that is no UTF-8: lone surrogates, or bytes of
            another encoding, which Parquet takes as they come.
    """
    start = 0
    try:
        for batch in file.iter_batches(rows, columns=columns):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                at = _first_invalid(column)
                if at is not None:
                    raise InputError(
                        f"row {start + at} holds text that is not UTF-8",
                        where=f"{where}, column {name}",
                        fix="write the column again as UTF-8",
                    )
            yield batch
            start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"can't read this Parquet to its end: {error}", where=where, fix="write it again") from None


def first_rows(file: pq.ParquetFile, columns: list[str] | None, where: str, rows: int) -> pa.RecordBatch | None:
    """The first batch of a user's file, see `batches_of`; None where it has no row."""
    return next(batches_of(file, columns, where, rows), None)


def _first_invalid(column: pa.Array) -> int | None:
    """The first row of a column whose content is not what its type promises."""
    try:
        column.validate(full=True)
        return None
    except pa.ArrowInvalid:
        pass
    for at in range(len(column)):
        try:
            column.take(pa.array([at])).validate(full=True)  # a slice would still hold what lies around it
        except pa.ArrowInvalid:
            return at
    return 0


def is_readable(path: Path) -> bool:
    """Whether a file is Parquet with a whole footer."""
    try:
        open_parquet(path)
    except InputError:
        return False
    return True


@dataclass(frozen=True)
class ColumnRoles:
    """Which columns of a user's file mean what.

    Attributes:
        text: the text columns.
        id: the unique column, if there is one.
        carry: the columns carried along as they are.
        label: the label column, for files that have labels.
    """

    text: tuple[str, ...]
    id: str | None = None
    carry: tuple[str, ...] = ()
    label: str | None = None

    @property
    def wanted(self) -> list[str]:
        """The columns to read."""
        named = [*self.text, *self.carry, self.id, self.label]
        return list(dict.fromkeys(name for name in named if name is not None))


def check_columns(
    file: pq.ParquetFile, roles: ColumnRoles, where: str, wanted: str = "name the right one under inputs"
) -> None:
    """Check that the columns are there and hold what they should.

    Args:
        file: the user's file.
        roles: its columns.
        where: what errors call the file.
        wanted: what to do about a column that is not there.

    Raises:
        InputError: a column is missing or has a type that can't serve.
    """
    schema = file.schema_arrow
    for name in roles.wanted:
        if name not in schema.names:
            raise InputError(
                f"there is no column {name!r}",
                where=where,
                fix=f"the file has: {', '.join(schema.names)}; {wanted}",
            )
        if schema.names.count(name) > 1:
            raise InputError(f"the column {name!r} is there twice", where=where, fix="rename or drop one of them")
    for article, role, column in (("an", "id", roles.id), ("a", "label", roles.label)):
        if column is not None and pa.types.is_nested(schema.field(column).type):
            raise InputError(
                f"the column {column!r} holds {schema.field(column).type}, which can't be {article} {role}",
                where=where,
                fix=f"name another column under inputs.{role}",
            )
    for name in roles.text:
        kind = plain_type(schema.field(name).type)
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(
                f"the column {name!r} holds {schema.field(name).type}, not text",
                where=where,
                fix="write it as text, or name another column under inputs.text",
            )


def plain_type(kind: pa.DataType) -> pa.DataType:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if pa.types.is_string_view(kind) else kind  # Arrow can't filter views


def _decoded(column: pa.Array) -> pa.Array:
    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return column.cast(plain_type(column.type))


def as_strings(column: pa.Array) -> pa.Array:
    """A column as plain strings, dictionaries decoded, numbers spelled out."""
    return _decoded(column).cast(pa.string())


def content_hash(texts: Sequence[str]) -> str:
    """The hash of what a labeler is shown: 16 hex digits of SHA-256 over the NFC text of each column."""
    joined = "\x1f".join(unicodedata.normalize("NFC", text) for text in texts)
    return hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def rows_schema(roles: ColumnRoles, source: pa.Schema) -> pa.Schema:
    """The schema in which rows travel between stages."""
    fields = [pa.field("row_id", pa.string()), pa.field("content_hash", pa.string())]
    fields += [pa.field(TEXT + name, pa.string()) for name in roles.text]
    # `datasets` has no feature for dictionaries, so that carried ones are decoded.
    fields += [pa.field(CARRY + name, plain_type(source.field(name).type)) for name in roles.carry]
    if roles.label is not None:
        fields.append(pa.field("label", pa.int64()))
    return pa.schema(fields)


QUARANTINE_SCHEMA = pa.schema([("row", pa.int64()), ("reason", pa.string()), ("text", pa.string())])


@dataclass
class Ingested:
    """What `ingest` found in a file."""

    rows: int = 0
    quarantined: int = 0


def ingest(
    path: Path,
    roles: ColumnRoles,
    out: Path,
    *,
    label_names: Sequence[str] | None = None,
    quarantine: bool = False,
    progress: Progress = lambda done, total: None,
) -> Ingested:
    """Read a user's file batch by batch into ``out/rows.parquet`` and ``out/quarantine.parquet``.

    Args:
        path: the user's Parquet file.
        roles: its columns.
        out: a directory.
        label_names: for a file with labels, their names in order.
        quarantine: set rows without text aside instead of failing.
        progress: called with rows read, twice each, and how often rows are read in all.

    Raises:
        InputError: the file can't be read, lacks a column, or a row has no text, no known label, or an id twice; every
            message names the file, and the row.
    """
    where = str(path)
    file = open_parquet(path)
    check_columns(file, roles, where)
    schema = rows_schema(roles, file.schema_arrow)
    class_names = _class_names(file.schema_arrow, roles.label)
    # Read twice: whether a row's text or id repeats is known only when all have been seen.
    total = file.metadata.num_rows
    ids = _Ids(file, roles, out, where, progress)
    found = Ingested()
    row_number, kept_number = 0, 0
    with (
        parquet_writer(out / "rows.parquet", schema) as rows,
        parquet_writer(out / "quarantine.parquet", QUARANTINE_SCHEMA) as aside,
    ):
        for batch in told(batches_of(file, roles.wanted, where), progress, 2 * total, total):
            texts = {column: as_strings(batch.column(column)) for column in roles.text}
            empty = blank(list(texts.values()))
            if pc.any(empty).as_py():
                at = np.flatnonzero(np.asarray(empty)) + row_number
                if not quarantine:
                    raise InputError(
                        f"row {at[0]} has no text ({len(at)} such rows in this batch)",
                        where=f"{where}, column {' + '.join(roles.text)}",
                        fix="set inputs.on_bad_rows: quarantine to set such rows aside and go on",
                    )
                first = texts[roles.text[0]].filter(empty)
                aside.write_batch(
                    pa.record_batch([pa.array(at), pa.array(["no text"] * len(at)), first], schema=QUARANTINE_SCHEMA)
                )
                found.quarantined += len(at)
            keep = pc.invert(empty)
            numbers = np.flatnonzero(np.asarray(keep)) + row_number
            row_number += batch.num_rows
            plain = [_decoded(column) for column in batch.columns]
            batch = pa.RecordBatch.from_arrays(plain, names=batch.schema.names).filter(keep)
            shown = [pc.fill_null(texts[column].filter(keep), "") for column in roles.text]
            columns = [column.to_pylist() for column in shown]
            hashes = [content_hash(row) for row in zip(*columns, strict=True)]
            row_ids = ids.of(batch, hashes, kept_number, numbers)
            kept_number += batch.num_rows
            arrays = [pa.array(row_ids, pa.string()), pa.array(hashes, pa.string()), *shown]
            arrays += [batch.column(column) for column in roles.carry]
            if roles.label is not None:
                assert label_names is not None
                given = _label_texts(batch.column(roles.label), class_names)
                arrays.append(_label_numbers(given, label_names, numbers, f"{where}, column {roles.label}"))
            rows.write_batch(pa.record_batch(arrays, schema=schema))
            found.rows += batch.num_rows
    return found


def blank(texts: Sequence[pa.Array]) -> pa.Array:
    """Which rows have no text in any column."""
    empty = [pc.equal(pc.utf8_trim_whitespace(pc.fill_null(text, "")), "") for text in texts]
    return functools.reduce(pc.and_, empty)


class _Ids:
    """The row ids of one file: the user's, or the content hash with a counter from its second occurrence.

    Args:
        file: its id column, or else its text columns, are read through.
        roles: its columns.
        folder: for what does not fit into memory.
        where: what errors call the file.
        progress: see `ingest`.
    """

    def __init__(self, file: pq.ParquetFile, roles: ColumnRoles, folder: Path, where: str, progress: Progress) -> None:
        self.column = roles.id
        self.where = f"{where}, column {roles.id}"
        found = find_repeats(gather(self._hashes(file, roles, where, progress), folder), folder)
        self._occurrence, self._group = found.occurrence, found.group
        self._seen: dict[str, int] = {}

    def _hashes(self, file: pq.ParquetFile, roles: ColumnRoles, where: str, progress: Progress) -> Iterator[Hashes]:
        """A hash for each row that has text."""
        batches = batches_of(file, [*roles.text, *([self.column] if self.column else [])], where)
        for batch in told(batches, progress, 2 * file.metadata.num_rows):
            texts = [as_strings(batch.column(column)) for column in roles.text]
            keep = pc.invert(blank(texts))
            if self.column is not None:
                ids = as_strings(batch.column(self.column)).filter(keep)
                yield hashes_of_texts(pc.fill_null(ids, "").to_pylist())
            else:
                columns = [pc.fill_null(text.filter(keep), "").to_pylist() for text in texts]
                yield hashes_of_hex(pa.array([content_hash(row) for row in zip(*columns, strict=True)], pa.string()))

    def of(self, batch: pa.RecordBatch, hashes: list[str], start: int, numbers: npt.NDArray[np.int64]) -> list[str]:
        """The ids of the next rows.

        Args:
            batch: the rows that have text.
            hashes: their content hashes.
            start: how many such rows came before.
            numbers: their numbers in the file, for messages.

        Raises:
            InputError: a row has no id, or another row's.
        """
        rows = slice(start, start + batch.num_rows)
        if self.column is None:
            counts = self._occurrence[rows].tolist()
            return [hash_ if n == 1 else f"{hash_}-{n}" for hash_, n in zip(hashes, counts, strict=True)]
        ids: list[str | None] = as_strings(batch.column(self.column)).to_pylist()
        if None in ids:
            raise InputError(
                f"row {numbers[ids.index(None)]} has no id", where=self.where, fix="fill it, or leave inputs.id out"
            )
        checked = [row_id for row_id in ids if row_id is not None]
        for i in np.flatnonzero(self._group[rows] >= 0):  # compared as text: two ids may have one hash
            row_id = checked[i]
            if row_id in self._seen:
                raise InputError(
                    f"row {numbers[i]} has the id {row_id!r}, as row {self._seen[row_id]} has",
                    where=self.where,
                    fix="make the ids unique, or leave inputs.id out: ids are then made from the text",
                )
            self._seen[row_id] = int(numbers[i])
        return checked


def _class_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    """The names behind a ClassLabel column, where `datasets` left them in the footer."""
    if label is None or b"huggingface" not in (schema.metadata or {}):
        return None
    from datasets import ClassLabel, Features

    feature = Features.from_arrow_schema(schema).get(label)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _label_texts(column: pa.Array, class_names: list[str] | None) -> list[str | None]:
    if class_names is not None:
        known = range(len(class_names))  # a number beyond them is an unknown label like any other
        return [None if i is None or i < 0 else class_names[i] if i in known else str(i) for i in column.to_pylist()]
    texts: list[str | None] = as_strings(column).to_pylist()
    return texts


def label_names_in(file: pq.ParquetFile, label: str, where: str) -> dict[str | None, int]:
    """The distinct label names of a file's label column, each with the first row that has it.

    Raises:
        InputError: it can't be read to its end.
    """
    names = _class_names(file.schema_arrow, label)
    found: dict[str | None, int] = {}
    start = 0
    for batch in batches_of(file, [label], where):
        for row, name in enumerate(_label_texts(batch.column(0), names), start):
            found.setdefault(name, row)
        start += batch.num_rows
    return found


def unknown_label(label: str | None) -> str:
    """What is said of a label that is none of the task's.

    >>> unknown_label("spam"), unknown_label(None)
    ("the unknown label 'spam'", 'no label')
    """
    return "no label" if label is None else f"the unknown label {label!r}"


def _label_numbers(
    given: list[str | None], names: Sequence[str], numbers: npt.NDArray[np.int64], where: str
) -> pa.Array:
    index = {name: i for i, name in enumerate(names)}
    for label, number in zip(given, numbers, strict=True):
        if label not in index:
            raise InputError(
                f"row {number} has {unknown_label(label)}",
                where=where,
                fix=f"the task's labels are: {', '.join(names)}",
            )
    return pa.array([index[label] for label in given if label is not None], pa.int64())


@contextmanager
def opened(location: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of ours at a path or URL; behind a URL only what is asked for is read."""
    here = local_path(location)
    if here is not None:
        with pq.ParquetFile(here) as file:
            yield file
        return
    fs, path = filesystem(location)
    with translated(location), fs.open(path, "rb") as raw, pq.ParquetFile(raw) as file:
        yield file


def holds_content(location: str, contents: Collection[str]) -> bool:
    """Whether a Parquet file of ours, at a path or URL, has a row with one of some content hashes."""
    wanted = pa.array(sorted(contents), pa.string())
    with opened(location) as file:
        if "content_hash" not in file.schema_arrow.names:
            return False
        batches = file.iter_batches(BATCH_ROWS, columns=["content_hash"])
        return any(pc.any(pc.is_in(batch.column(0), wanted)).as_py() for batch in batches)


def text_columns(schema: pa.Schema) -> list[str]:
    """The names of the columns that hold texts."""
    return [name for name in schema.names if name.startswith(TEXT)]


class Rows:
    """Rows as the stages leave them.

    Args:
        path: an artifact's directory that holds ``rows.parquet``.
    """

    def __init__(self, path: Path) -> None:
        self.file = path / "rows.parquet"

    @property
    def schema(self) -> pa.Schema:
        """The file's schema."""
        return pq.read_schema(self.file)

    @property
    def text_columns(self) -> list[str]:
        """The names of the columns that hold texts."""
        return text_columns(self.schema)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows at once; for the labelled, test, transfer and queue sets, which are small."""
        return pq.read_table(self.file, columns=columns)

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows in batches of at most `BATCH_ROWS`."""
        with pq.ParquetFile(self.file) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=columns)

    def content_hashes(self) -> Iterator[Hashes]:
        """The rows' content hashes, batch by batch."""
        for batch in self.batches(["content_hash"]):
            yield hashes_of_hex(batch.column(0))

    def take(self, at: npt.NDArray[np.int64], columns: list[str]) -> pa.Table:
        """Some columns of the rows with the given ascending numbers, read batch by batch."""
        parts, start = [], 0
        for batch in self.batches(columns) if len(at) else ():
            mine = at[(at >= start) & (at < start + batch.num_rows)] - start
            parts.append(batch.take(pa.array(mine, pa.int64())))
            start += batch.num_rows
        return pa.Table.from_batches(parts, schema=pa.schema([self.schema.field(name) for name in columns]))

    @property
    def count(self) -> int:
        """How many rows."""
        with pq.ParquetFile(self.file) as file:
            return int(file.metadata.num_rows)


def texts_of(table: pa.Table | pa.RecordBatch) -> dict[str, list[str]]:
    """The text columns of rows, by the names that patterns use."""
    return {name.removeprefix(TEXT): table.column(name).to_pylist() for name in text_columns(table.schema)}


def probability_type(labels: int) -> pa.DataType:
    """A distribution over the labels: float32, fixed length, so that readers see K."""
    return pa.list_(pa.float32(), labels)


def to_lists(values: Floats) -> pa.Array:
    """``[rows, labels]`` float32 as an Arrow column of fixed-size lists."""
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).ravel(), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, type=probability_type(values.shape[1]))


def from_lists(column: pa.Array | pa.ChunkedArray) -> Floats:
    """An Arrow column of fixed-size lists as ``[rows, labels]`` float32."""
    chunks: Iterable[pa.Array] = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    width = column.type.list_size
    parts = [np.asarray(chunk.flatten(), dtype=np.float32).reshape(-1, width) for chunk in chunks]
    return np.concatenate(parts) if parts else np.zeros((0, width), dtype=np.float32)
