"""Labelling a Parquet file with a student, outside any run."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import locations, tables, transfer
from pipeline.device import numeric_profile
from pipeline.errors import InputError, loading, writing
from pipeline.progress import Progress, part_of
from pipeline.settings import Settings
from pipeline.student import SETTINGS, Student, sound
from pipeline.tables import ColumnRoles
from pipeline.versions import version_in_force, whole_versions

ADDED = ("predicted", "predicted_name", "predicted_confidence", "predicted_probs")


def find_student(path: Path | str) -> Path:
    """The student's directory, given a release path or URL, one of its versions, or the student itself.

    Args:
        path: what lies behind a URL is fetched into the cache of this machine.

    Raises:
        InputError: there is none.
    """
    here = locations.local_path(path)
    found = _remote_student(str(path)) if here is None else _local_student(here)
    if found is None and (versions := list(whole_versions(path))):
        raise InputError(
            "no version of this release is in force",
            where=str(path),
            fix=f"put one in force: clozeline promote {path} {versions[-1]}",
        )
    if found is None:
        raise InputError(
            "this is neither a release nor a student",
            where=str(path),
            fix="give a release's directory or URL, or its model/",
        )
    return found


def _local_student(path: Path) -> Path | None:
    candidates = [path, path / "model"]
    if (version := version_in_force(path)) is not None:
        candidates.append(Path(version, "model"))
    return next((candidate for candidate in candidates if (candidate / SETTINGS).is_file()), None)


def _remote_student(url: str) -> Path | None:
    candidates = [url, locations.join(url, "model")]
    if (version := version_in_force(url)) is not None:
        candidates.append(locations.join(version, "model"))
    for candidate in candidates:
        if locations.read(locations.join(candidate, SETTINGS)) is not None:
            return transfer.fetch_tree(candidate, Settings().cache_path)
    return None


def _footer(source: pa.Schema, added: Any) -> dict[bytes, bytes]:
    """The source's footer with the names of the labels that are added, and of those that it had."""
    from datasets import Features

    footer = dict(source.metadata or {})
    try:
        features = Features({**Features.from_arrow_schema(source), **added})
    except (ValueError, NotImplementedError):
        return footer  # a column for which `datasets` has no feature: the names stand in predicted_name
    return footer | dict(features.arrow_schema.metadata)


def predict_file(
    student: Path | str, source: Path | str, target: Path, progress: Progress = lambda done, total: None
) -> int:
    """Write a copy of a Parquet file with the student's label, confidence and distribution for each row.

    Args:
        student: see `find_student`.
        source: a Parquet file with the student's text columns, or its URL. A row without text gets no label.
        target: where to write; replaced whole at the end, and never the source.
        progress: called with rows done and rows in all.

    Returns:
        The number of rows.

    Raises:
        InputError: the file can't be read, lacks a text column, or has a column that would be added; or the target
            can't be written; or the student's scores are no numbers.
    """
    from datasets import ClassLabel, Features, List, Value

    directory = find_student(student)
    here = transfer.fetch_file(str(source), Settings().cache_path)
    if target.exists() and target.samefile(here):
        raise InputError("this is the file to label", where=str(target), fix="choose another OUT.parquet")
    file = tables.open_parquet(here)
    for name in ADDED:
        if name in file.schema_arrow.names:
            raise InputError(f"the file has a column {name!r} already", where=str(source), fix="rename it")
    with loading("the student", directory, "take another copy of it, or label again"):
        dtype = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))["dtype"]
    loaded = Student.load(directory, numeric_profile(dtype))
    tables.check_columns(
        file, ColumnRoles(loaded.template.columns), str(source), "rename yours as the student reads it"
    )
    added = Features(
        {
            "predicted": ClassLabel(names=loaded.labels),
            "predicted_name": Value("string"),
            "predicted_confidence": Value("float32"),
            "predicted_probs": List(Value("float32"), length=len(loaded.labels)),
        }
    )
    schema = pa.schema([*file.schema_arrow, *added.arrow_schema], metadata=_footer(file.schema_arrow, added))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    total = int(file.metadata.num_rows)
    with writing("the labelled rows", target, "choose another OUT.parquet"):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tables.parquet_writer(temporary, schema) as writer:
                done = 0
                for batch in tables.batches_of(file, None, str(source)):
                    arrays = _labelled(loaded, batch, part_of(progress, done, batch.num_rows, total))
                    writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
                    done += batch.num_rows
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    return total


def _labelled(student: Student, batch: pa.RecordBatch, progress: Progress) -> list[pa.Array]:
    """The columns of some rows, and those that are added: null where there is no text."""
    given = {name: tables.as_strings(batch.column(name)) for name in student.template.columns}
    blank = tables.blank(list(given.values()))
    texts = {name: [text or "" for text in column.to_pylist()] for name, column in given.items()}
    probabilities = np.exp(sound(student.log_probabilities(texts, progress)))
    chosen = probabilities.argmax(axis=1)
    added = [
        pa.array(chosen, pa.int64()),
        pa.array([student.labels[i] for i in chosen], pa.string()),
        pa.array(probabilities.max(axis=1), pa.float32()),
        tables.to_lists(probabilities),
    ]
    if pc.any(blank).as_py():
        added = [pc.if_else(blank, pa.scalar(None, column.type), column) for column in added]
    return [*batch.columns, *added]
