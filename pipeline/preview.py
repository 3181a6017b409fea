"""What the patterns look like on real rows, before any model runs."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline import tables
from pipeline.base_model import load_tokenizer
from pipeline.tables import ColumnRoles
from pipeline.task import Task
from pipeline.template import Encoder, Template
from pipeline.verbalizer import Verbalizer

_ROWS = 1000
_EXAMPLES = 2
_MOST_SHOWN = 600
_JOINERS = "\u200c\u200d"  # part of emoji, and of how Persian is written


@dataclass(frozen=True)
class PatternPreview:
    """One pattern on the first rows.

    Attributes:
        name, pattern: the annotator's.
        examples: rendered rows.
        words: each label word with its tokens.
        mean_tokens, max_tokens: of the encoded rows, as the model reads them.
        shortened: the share of rows whose text is cut.
    """

    name: str
    pattern: str
    examples: list[str]
    words: dict[str, list[str]]
    mean_tokens: float
    max_tokens: int
    shortened: float


@dataclass(frozen=True)
class Preview:
    """The patterns on the first rows of a file.

    Attributes:
        file: its path or URL.
        rows: how many rows with text were looked at.
        blank: how many rows without.
        patterns: a preview each.
    """

    file: str
    rows: int
    blank: int
    patterns: list[PatternPreview]


def preview_task(task: Task) -> Preview:
    """Render and encode the first rows of the first unlabelled file with every pattern.

    Rows without text are left out, as a run leaves them out or refuses them.

    Raises:
        InputError: the file, a pattern or a label word can't be used.
    """
    base = task.base()
    tokenizer = load_tokenizer(base.path)
    training = task.resolved("training")
    encoder = Encoder(tokenizer, min(training["max_length"], base.positions), training["truncation"])
    file = task.unlabelled_files()[0]
    parquet = tables.open_parquet(file)
    tables.check_columns(parquet, ColumnRoles(tuple(task.inputs.text)), str(file))
    batch = tables.first_rows(parquet, task.inputs.text, str(file), _ROWS)
    read = [[] if batch is None else tables.as_strings(batch.column(name)).to_pylist() for name in task.inputs.text]
    found = [[text or "" for text in row] for row in zip(*read, strict=True)]
    shown = [row for row in found if any(text.strip() for text in row)]
    columns = {name: [row[i] for row in shown] for i, name in enumerate(task.inputs.text)}
    rows = len(shown)
    previews = []
    for name, annotator, seed in task.members():
        if seed:
            continue
        template = Template.parse(annotator.pattern)
        verbalizer = Verbalizer.resolve(task.words_of(annotator), tokenizer)
        encoded = encoder.encode(template, columns, masks=verbalizer.widths[-1])
        lengths = encoded.tokens.lengths if rows else np.zeros(1)
        rendered = [
            template.render({column: columns[column][i] for column in template.columns}, tokenizer.mask_token)
            for i in range(min(_EXAMPLES, rows))
        ]
        words = {word.text: tokenizer.convert_ids_to_tokens(list(word.ids)) for word in verbalizer.words}
        shortened = float(encoded.shortened.mean()) if rows else 0.0
        previews.append(
            PatternPreview(
                name, annotator.pattern, rendered, words, float(lengths.mean()), int(lengths.max()), shortened
            )
        )
    return Preview(task.source_of(file), rows, len(found) - rows, previews)


def printable(text: str) -> str:
    """A text that does nothing to a terminal: characters that are no sign of their own are spelled out.

    >>> print(printable("\\x1b[31mred\\n"))
    \\x1b[31mred\\n
    """
    return "".join(_spelled(text))


def excerpt(text: str) -> str:
    """A text for the terminal: printable, and with its two ends alone where it is long."""
    whole = _within(_spelled(text), _MOST_SHOWN)
    if len(whole) == len(text):
        return "".join(whole)
    begins, ends = (_within(_spelled(part), _MOST_SHOWN // 2) for part in (text, reversed(text)))
    return f"{''.join(begins)} … {''.join(reversed(ends))}"


def _spelled(text: Iterable[str]) -> Iterable[str]:
    """Each character of a text, or how it is written in Python."""
    for char in text:
        hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _JOINERS
        yield ascii(char)[1:-1] if hidden else char


def _within(pieces: Iterable[str], room: int) -> list[str]:
    """The first pieces that take no more than so many characters."""
    kept = []
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            break
        kept.append(piece)
    return kept
