"""A first task file, written from what a Parquet file shows."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import tables
from pipeline.errors import InputError
from pipeline.release import OWN_COLUMNS
from pipeline.template import MASK

_SAMPLE_ROWS = 5000
_MOST_LABELS = 100
_LONGEST_LABEL = 100
_LONGEST_ID = 64
_LABEL_NAMES = ("label", "class", "category", "topic", "target")


@dataclass(frozen=True)
class _Column:
    """A column of the sample.

    Attributes:
        name, kind: its name and its type, of a dictionary that of its values.
        values: as `ingest` spells them, without those that say nothing; None where it can't spell them.
        distinct: how many different ones.
        unfit: why it can't be the label; empty where it can.
    """

    name: str
    kind: pa.DataType
    values: pa.Array | None = None
    distinct: int = 0
    unfit: str = ""

    @classmethod
    def of(cls, name: str, column: pa.Array) -> _Column:
        """Look at the rows of a column."""
        kind = tables.plain_type(column.type)
        floating = pa.types.is_floating(kind)
        if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or floating):
            return cls(name, kind, unfit=f"it holds {kind}")
        values = tables.as_strings(column)
        values = values.filter(pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(values), ""), False))
        if floating:  # what pandas makes of whole numbers when one is missing
            values = values.filter(pc.not_equal(values, "nan"))
            numbers = values.cast(pa.float64())  # not the column's own: of half floats Arrow knows little
            if not pc.all(pc.and_(pc.is_finite(numbers), pc.equal(pc.floor(numbers), numbers))).as_py():
                return cls(name, kind, values, unfit=f"it holds {kind}, not all of them whole")
        distinct = pc.unique(values)
        return cls(name, kind, values, len(distinct), _unfit(distinct.to_pylist(), len(column)))

    @property
    def is_label(self) -> bool:
        """Whether it is called like a label."""
        return any(word in self.name.lower() for word in _LABEL_NAMES)

    @property
    def length(self) -> float:
        """The mean length of its texts."""
        return pc.mean(pc.utf8_length(self.values)).as_py() or 0.0

    def is_id(self, rows: int) -> bool:
        """Whether it can be the id of so many rows: a number or one short word each, never the same."""
        # A title that happens to be distinct here is no id.
        return (
            (_is_text(self.kind) or pa.types.is_integer(self.kind))
            and not self.is_label
            and self.distinct == rows
            and not pc.any(pc.match_substring_regex(self.values, r"\s")).as_py()
            and pc.max(pc.utf8_length(self.values)).as_py() <= _LONGEST_ID
        )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _unfit(names: Sequence[str], rows: int | None = None) -> str:
    """Why these can't be the labels of so many rows; empty where they can."""
    if len(names) < 2:
        return "it holds fewer than two different values"
    if len(names) > _MOST_LABELS:
        return f"it holds more than {_MOST_LABELS} different values"
    if rows is not None and len(names) > rows // 2:
        return f"it holds {len(names)} different values in {rows} rows"
    if max(map(len, names)) > _LONGEST_LABEL:
        return f"it holds values of more than {_LONGEST_LABEL} characters"
    return ""


@dataclass
class _Labels:
    """The label column of a draft.

    Attributes:
        column: its name, where there is one.
        names: the labels.
        missing: whether rows have none.
        others: why columns that are called like a label are not the label.
    """

    column: str | None = None
    names: list[str] = field(default_factory=list)
    missing: bool = False
    others: dict[str, str] = field(default_factory=dict)


def starter_task(file: Path, unlabelled: str | None = None, relative_to: Path = Path(".")) -> str:
    """The text of a commented task file.

    The longest text column becomes the text, a column of few distinct values the label, and a column of
    distinct values the id. What can't be seen in the file is left to fill in, marked TODO.

    Args:
        file: a Parquet file, with labels or without.
        unlabelled: where the rows to label are, if not in this file.
        relative_to: the directory in which the task file will lie.

    Raises:
        InputError: the file can't be read, has no text column, or one whose name no task can have.
    """
    parquet = tables.open_parquet(file)
    batch = tables.first_rows(parquet, None, str(file), _SAMPLE_ROWS)
    if batch is None or batch.num_rows == 0:
        raise InputError("the file has no row", where=str(file))
    columns = [_Column.of(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    text = _text_among(columns, file)
    others = [column for column in columns if column is not text]
    ids = [column.name for column in others if column.is_id(batch.num_rows)]
    identifier = next((name for name in ids if "id" in name.lower()), ids[0] if ids else None)
    labels = _labels_among([column for column in others if column.name != identifier], parquet, file)
    _refuse_name(text.name, labels.names, file)
    return _task_text(file, unlabelled, relative_to, text.name, identifier, labels, batch.schema.names)


def _text_among(columns: list[_Column], file: Path) -> _Column:
    """The column with the longest texts, unless it is the label.

    Raises:
        InputError: there is none.
    """
    labels = [column for column in columns if column.is_label and not column.unfit]
    texts = [column for column in columns if _is_text(column.kind)]
    texts = [column for column in texts if not column.is_label or (column.unfit and labels)]
    if not texts:
        held = ", ".join(f"{column.name} ({column.kind})" for column in columns)
        raise InputError(
            f"no column holds text; the file has: {held}",
            where=str(file),
            fix=f"write the texts as a string column that is not called like a label ({', '.join(_LABEL_NAMES)})",
        )
    return max(texts, key=lambda column: column.length)


def _labels_among(columns: list[_Column], parquet: pq.ParquetFile, file: Path) -> _Labels:
    """The first column that can be the label: one that is called so, else one that holds words or whole numbers."""
    found = _Labels(others={column.name: column.unfit for column in columns if column.is_label and column.unfit})

    def rank(column: _Column) -> tuple[bool, bool]:
        return not column.is_label, pa.types.is_boolean(column.kind) or pa.types.is_floating(column.kind)

    for column in sorted((column for column in columns if not column.unfit), key=rank):
        given = tables.label_names_in(parquet, column.name, str(file))
        names = sorted(name for name in given if name and name.strip())
        if pa.types.is_floating(column.kind):
            names = [name for name in names if name != "nan"]
        unfit = _unfit(names)  # the sample is not all of it
        if not unfit:
            found.column, found.names, found.missing = column.name, names, len(names) < len(given)
            break
        if column.is_label:
            found.others[column.name] = unfit
    return found


def _refuse_name(text: str, labels: Sequence[str], file: Path) -> None:
    """Make sure that a task can name the text column.

    Raises:
        InputError: it can't.
    """
    if text == MASK:
        why = "patterns call their slot so"
    elif not text or "{" in text or "}" in text:
        why = "patterns have a column's name between braces"
    elif text in OWN_COLUMNS:
        why = "a release has a column of its own of that name"
    elif text in {f"p_{label}" for label in labels}:
        why = "the export for Label Studio has a field of its own of that name"
    else:
        return
    raise InputError(f"the text column can't be called {text!r}: {why}", where=str(file), fix="rename the column")


def _quoted(text: str) -> str:
    """A text as YAML, in one line; what would not be printed, or read back, is escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escaped(char) for char in quoted)


def _escaped(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"


def _in_comment(text: str) -> str:
    """A text in a comment, which ends with its line."""
    return text if text.isprintable() else _quoted(text)


def _relative(file: Path, root: Path) -> str:
    file, root = file.resolve(), root.resolve()
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def _task_text(
    file: Path,
    unlabelled: str | None,
    root: Path,
    text: str,
    identifier: str | None,
    labels: _Labels,
    columns: list[str],
) -> str:
    here = _quoted(_relative(file, root))
    if labels.names:
        words = "\n".join(_label_lines(labels))
        labelled = f"  labelled: {here}"
        source = _quoted(unlabelled) if unlabelled else '"unlabelled/*.parquet"  # TODO: the rows to label'
    else:
        words = "  positive: [good, great]      # TODO: your labels, each with its words\n  negative: [bad, terrible]"
        labelled = "  # labelled: labelled.parquet # a few labelled rows; without them the patterns work zero-shot"
        source = _quoted(unlabelled) if unlabelled else here
    unique = (
        f"id: {_quoted(identifier)}" if identifier else "# id: id   # a unique column; without it: a hash of the text"
    )
    slot = "{" + text + "}"
    label = f"label: {_quoted(labels.column)}" if labels.column else "# label: label"
    for name, why in labels.others.items():
        label += f"\n  # {_quoted(name)} is not taken for the label: {_in_comment(why)}"
    seen = ", ".join(map(_in_comment, columns))
    return f"""# A Clozeline task, drafted from {_in_comment(file.name)} (columns: {seen}).
# Paths are relative to this file. `clozeline check` tells mistakes, `clozeline preview` shows the patterns,
# docs/task-file.md lists every key.

labels:                          # each label with the words that may stand in the slot; one token each is fastest
{words}

inputs:
{labelled}
  unlabelled: {source}
  # test: test.parquet           # labelled rows for the report alone
  text: {_quoted(text)}
  {label}
  {unique}
  # carry: []                    # columns to carry along into the release
  # on_bad_rows: fail            # or quarantine: set rows without text aside and go on

annotators:                      # one model is fine-tuned a pattern; two to five different ones are a good start
  - {_quoted(f"{slot} It was {{mask}}.")}
  - {_quoted(f"[{{mask}}] {slot}")}

# base_model: embedded           # lower-case English; or a directory, or a hub name: roberta-large@REVISION
# training:
#   preset: quick                # or paper (Schick & Schütze 2021, table 5)
#   steps: auto                  # as many as read the labelled rows eight times, from 50 up to 1,000
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


def _label_lines(labels: _Labels) -> list[str]:
    """A line for each label with its word, and what is left to do about it."""
    guesses = {name: _word_for(name) for name in labels.names}
    readers = Counter(map(_as_read, guesses.values()))
    taken = {guess for guess, count in readers.items() if count == 1}
    lines = []
    for name, word in guesses.items():
        todo = ""
        if readers[_as_read(word)] > 1:
            choices = itertools.chain([name.strip()], (f"{word} {number}" for number in itertools.count(2)))
            word = next(choice for choice in choices if _as_read(choice) not in taken)
            taken.add(_as_read(word))
            todo = "  # TODO: a word of its own; another label has the same"
        elif word in ("true", "false") or not any(char.isalpha() for char in word):
            todo = "  # TODO: a word that says what it means"
        lines.append(f"  {_quoted(name)}: [{_quoted(word)}]{todo}")
    if labels.missing:
        where = _quoted(labels.column or "")
        lines.append(f"  # TODO: some rows have no {where}, or an empty one; drop them, or label them")
    return lines


def _word_for(label: str) -> str:
    """A label's name as running text: a first guess at its word."""
    return label.replace("_", " ").replace("-", " ").split("/")[-1].strip().lower() or label.strip()


def _as_read(word: str) -> str:
    """A word without what a tokenizer may not see: case, accents, control characters, the width of gaps."""
    plain = unicodedata.normalize("NFKD", word.lower())
    seen = "".join(char for char in plain if unicodedata.category(char) not in ("Mn", "Cc", "Cf") or char.isspace())
    return " ".join(seen.split())
