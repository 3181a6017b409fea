"""A first task file, written from what a Parquet file shows."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import tables
from pipeline.errors import InputError

_SAMPLE_ROWS = 5000
_MOST_LABELS = 100
_LONGEST_ID = 64


def starter_task(file: Path, unlabelled: str | None = None, relative_to: Path = Path(".")) -> str:
    """The text of a commented task file.

    The longest text column becomes the text, a column of few distinct values the label, and a column of
    distinct values the id. What can't be seen in the file is left to fill in, marked TODO.

    Args:
        file: a Parquet file, with labels or without.
        unlabelled: where the rows to label are, if not in this file.
        relative_to: the directory in which the task file will lie.

    Raises:
        InputError: the file can't be read or has no text column.
    """
    parquet = tables.open_parquet(file)
    batch = tables.first_rows(parquet, None, str(file), _SAMPLE_ROWS)
    if batch is None or batch.num_rows == 0:
        raise InputError("the file has no row", where=str(file))
    sample = pa.Table.from_batches([batch])
    lengths, distinct, columns = {}, {}, {}
    for field in sample.schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
            continue
        values = tables.as_strings(sample.column(field.name).combine_chunks())
        columns[field.name] = values
        distinct[field.name] = len(pc.unique(values.drop_null()))
        if not pa.types.is_integer(kind):
            lengths[field.name] = pc.mean(pc.utf8_length(values)).as_py() or 0.0
    text = max(lengths, key=lambda name: lengths[name], default=None)
    if text is None:
        raise InputError(
            f"no column holds text; the file has: {', '.join(sample.column_names)}",
            where=str(file),
            fix="write the texts as a string column",
        )
    rows = sample.num_rows
    # A title that happens to be distinct here is no id: an id is a number, or one short word.
    unique = [
        n
        for n in columns
        if n != text
        and distinct[n] == rows
        and columns[n].null_count == 0
        and not pc.any(pc.match_substring_regex(columns[n], r"\s")).as_py()
        and pc.max(pc.utf8_length(columns[n])).as_py() <= _LONGEST_ID
    ]
    identifier = next((n for n in unique if "id" in n.lower()), unique[0] if unique else None)
    few = [n for n in columns if n not in (text, identifier) and 2 <= distinct[n] <= min(_MOST_LABELS, rows // 2)]
    named = [n for n in few if any(word in n.lower() for word in ("label", "class", "category", "topic", "target"))]
    label = next(iter(named), next(iter(few), None))
    names = sorted(name for name in tables.label_names_in(parquet, label, str(file)) if name) if label else []
    return _task_text(file, unlabelled, relative_to, text, identifier, label, names, sample.column_names)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _relative(file: Path, root: Path) -> str:
    file, root = file.resolve(), root.resolve()
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def _task_text(
    file: Path,
    unlabelled: str | None,
    root: Path,
    text: str,
    identifier: str | None,
    label: str | None,
    names: list[str],
    columns: list[str],
) -> str:
    here = _quoted(_relative(file, root))
    if names:
        labels = "\n".join(f"  {_quoted(name)}: [{_quoted(_word_for(name))}]" for name in names)
        labelled = f"  labelled: {here}"
        source = _quoted(unlabelled) if unlabelled else '"unlabelled/*.parquet"  # TODO: the rows to label'
    else:
        labels = "  positive: [good, great]      # TODO: your labels, each with its words\n  negative: [bad, terrible]"
        labelled = "  # labelled: labelled.parquet # a few labelled rows; without them the patterns work zero-shot"
        source = _quoted(unlabelled) if unlabelled else here
    unique = (
        f"id: {_quoted(identifier)}" if identifier else "# id: id   # a unique column; without it: a hash of the text"
    )
    slot = "{" + text + "}"
    return f"""# A Clozeline task, drafted from {file.name} (columns: {", ".join(columns)}).
# Paths are relative to this file. `clozeline check` tells every mistake, `clozeline preview` shows the patterns.

labels:                          # each label with the words that may stand in the slot; one token each is fastest
{labels}

inputs:
{labelled}
  unlabelled: {source}
  # test: test.parquet           # labelled rows for the report alone
  text: {_quoted(text)}
  {f"label: {_quoted(label)}" if label else "# label: label"}
  {unique}
  # carry: []                    # columns to carry along into the release
  # on_bad_rows: fail            # or quarantine: set rows without text aside and go on

annotators:                      # one model is fine-tuned a pattern; two to five different ones are a good start
  - {_quoted(f"{slot} It was {{mask}}.")}
  - {_quoted(f"[{{mask}}] {slot}")}

# base_model: embedded           # lower-case English; or a directory, or a hub name: roberta-large@REVISION
# training:
#   preset: quick                # or paper (Schick & Schütze 2021, table 5)
#   steps: 50
#   learning_rate: 1.0e-4
#   max_length: 128
#   folds: 2                     # cross-validation; each fold costs one more fit
# adapt:
#   steps: 0                     # masked-language modelling on the unlabelled texts first; say, 1000
# ensemble:
#   weights: weighted            # or uniform
# ipet:
#   generations: 0               # iPET: 3 trains the annotators anew three times, on rows that others were sure of
# student:
#   temperature: 2.0
# release:
#   review_budget: 500           # rows for people to review
"""


def _word_for(label: str) -> str:
    """A label's name as running text: a first guess at its word."""
    return label.replace("_", " ").replace("-", " ").split("/")[-1].strip().lower() or label
