"""What the patterns look like on real rows, before any model runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline import tables
from pipeline.cloze import load_tokenizer
from pipeline.tables import ColumnRoles
from pipeline.task import Task
from pipeline.template import Encoder, Template
from pipeline.verbalizer import Verbalizer

_ROWS = 1000


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


def preview_task(task: Task, examples: int = 2) -> tuple[int, list[PatternPreview]]:
    """Render and encode the first rows of the first unlabelled file with every pattern.

    Returns:
        The number of rows looked at, and a preview a pattern.

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
    columns = {
        name: [] if batch is None else [text or "" for text in tables.as_strings(batch.column(name)).to_pylist()]
        for name in task.inputs.text
    }
    rows = len(columns[task.inputs.text[0]])
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
            for i in range(min(examples, rows))
        ]
        words = {word.text: tokenizer.convert_ids_to_tokens(list(word.ids)) for word in verbalizer.words}
        shortened = float(encoded.shortened.mean()) if rows else 0.0
        previews.append(
            PatternPreview(
                name, annotator.pattern, rendered, words, float(lengths.mean()), int(lengths.max()), shortened
            )
        )
    return rows, previews
