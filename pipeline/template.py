"""Patterns: a cloze template over the task's columns.

The language is as small as it can be: ``{column}`` stands for a column, ``{mask}`` for the slot that the
language model fills, ``{{`` and ``}}`` for literal braces, and everything else for itself. A template with one
``{mask}`` is a pattern (Schick & Schütze 2021, section 3); one without is what a plain classifier reads.

When a rendered text is longer than the model reads, only the columns' text is shortened, never the pattern
and never the mask. Several columns share the room max-min fairly: each gets an equal share, and what a short
column leaves over goes to the longer ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.ragged import Numbers, Ragged, TokenIds, offsets_of, spread

MASK = "mask"
_TEXTS_AT_ONCE = 2048
_ROWS_AT_ONCE = 10_000
Truncation = Literal["head", "tail"]


@dataclass(frozen=True)
class Literally:
    """A run of plain text in a template."""

    text: str


@dataclass(frozen=True)
class Column:
    """The place of a column's text."""

    name: str


@dataclass(frozen=True)
class Mask:
    """The slot that the language model fills."""


Part = Literally | Column | Mask


@dataclass(frozen=True)
class Template:
    """A parsed template.

    >>> Template.parse("{text} It was {mask}.").columns
    ('text',)
    """

    source: str
    parts: tuple[Part, ...]

    @classmethod
    def parse(cls, source: str) -> Template:
        """Parse a template.

        Raises:
            InputError: a brace without its partner, an empty placeholder, two masks, or neither a column nor
                a mask.
        """
        parts: list[Part] = []
        text: list[str] = []
        at = 0
        while at < len(source):
            char = source[at]
            if source[at : at + 2] in ("{{", "}}"):
                text.append(char)
                at += 2
            elif char == "{":
                end = source.find("}", at)
                name = source[at + 1 : end] if end > 0 else ""
                if not name or "{" in name:
                    raise InputError(
                        f"the pattern {source!r} has a '{{' at character {at + 1} that opens no placeholder",
                        fix="write {column} or {mask}; a literal brace is written twice: {{",
                    )
                if text:
                    parts.append(Literally("".join(text)))
                    text = []
                parts.append(Mask() if name == MASK else Column(name))
                at = end + 1
            elif char == "}":
                raise InputError(
                    f"the pattern {source!r} has a '}}' at character {at + 1} that closes nothing",
                    fix="a literal brace is written twice: }}",
                )
            else:
                text.append(char)
                at += 1
        if text:
            parts.append(Literally("".join(text)))
        template = cls(source, tuple(parts))
        if sum(isinstance(part, Mask) for part in parts) > 1:
            raise InputError(
                f"the pattern {source!r} has {{mask}} more than once",
                fix="keep one; a label word of several tokens widens it by itself",
            )
        if not template.columns:
            raise InputError(f"the pattern {source!r} names no column", fix="put a {column} in it")
        return template

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns it names, in order of first appearance."""
        return tuple(dict.fromkeys(part.name for part in self.parts if isinstance(part, Column)))

    @cached_property
    def has_mask(self) -> bool:
        """Whether it is a cloze (a pattern) or plain text."""
        return any(isinstance(part, Mask) for part in self.parts)

    def require_mask(self) -> Template:
        """Return itself if it is a cloze.

        Raises:
            InputError: there is no ``{mask}``.
        """
        if not self.has_mask:
            raise InputError(f"the pattern {self.source!r} has no {{mask}}", fix="put {mask} where the label word goes")
        return self

    def render(self, row: Mapping[str, str], mask: str = "____") -> str:
        """The text of one row, as a reader sees it (nothing shortened)."""
        return "".join(
            part.text if isinstance(part, Literally) else mask if isinstance(part, Mask) else row[part.name]
            for part in self.parts
        )

    def render_rows(self, columns: Mapping[str, Sequence[str]]) -> list[str]:
        """The texts of rows, given by column."""
        rows = zip(*(columns[name] for name in self.columns), strict=True)
        return [self.render(dict(zip(self.columns, row, strict=True))) for row in rows]


def fair_shares(lengths: Sequence[int], room: int) -> list[int]:
    """Share ``room`` tokens among texts of the given lengths, max-min fairly.

    No text gets more than its length; what is left goes to those that still want more; an odd token goes to
    the earlier text.

    >>> fair_shares([3, 50, 50], 23)
    [3, 10, 10]
    """
    shares = [0] * len(lengths)
    left = max(room, 0)
    wanting = [i for i, length in enumerate(lengths) if length > 0]
    while left and wanting:
        each = max(left // len(wanting), 1)
        for i in wanting:
            given = min(each, lengths[i] - shares[i], left)
            shares[i] += given
            left -= given
        wanting = [i for i in wanting if shares[i] < lengths[i]]
    return shares


@dataclass(frozen=True)
class TokenColumn:
    """One column of a table, tokenised.

    Attributes:
        tokens: at most the model's length of each text.
        full_lengths: int64 ``[rows]``, the tokens that each text had before that limit.
    """

    tokens: Ragged
    full_lengths: Numbers


@dataclass(frozen=True)
class Slot:
    """A column's place among token ids, and whether its text is tokenised with a space before it."""

    column: str
    space_before: bool


@dataclass(frozen=True)
class Encoded:
    """Rows ready for a model.

    Attributes:
        tokens: token ids, special tokens included.
        mask_at: int64 ``[rows, masks]``, where the mask tokens stand; ``masks`` is 0 without a slot.
        own: bool, one for each of ``tokens.values``: true where the token is of the row's own text, false where it
            belongs to the pattern, the slot or the special tokens. Masked-language modelling stays off the latter.
        shortened: bool ``[rows]``, true where text was cut.
    """

    tokens: Ragged
    mask_at: Numbers
    own: npt.NDArray[np.bool_]
    shortened: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: npt.NDArray[np.integer]) -> Encoded:
        """Some of the rows."""
        lengths = self.tokens.lengths[rows]
        places = spread(self.tokens.offsets[rows], lengths)
        tokens = Ragged(self.tokens.values[places], offsets_of(lengths))
        return Encoded(tokens, self.mask_at[rows], self.own[places], self.shortened[rows])


class Encoder:
    """Turns rows into token ids with one tokenizer.

    Each column's text is tokenised once, whatever the number of patterns: literal parts and columns are
    tokenised apart and joined as ids. A literal's trailing space moves to the part behind it, where byte-level
    tokenizers expect it.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        max_length: the most tokens the model reads, special tokens included.
        truncation: which end of a text is kept when it is too long, ``head`` or ``tail``.
    """

    def __init__(self, tokenizer: Any, max_length: int, truncation: Truncation = "head") -> None:
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        # A text that spells "[SEP]" or "</s>" is text: special tokens in the data are never interpreted.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        # BERT's pair is [CLS] ... [SEP], RoBERTa's <s> ... </s>; taken from the tokenizer so that no family
        # is named here.
        bare = self._backend.encode("a", add_special_tokens=False).ids
        framed = self._backend.encode("a").ids
        at = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        self._prefix, self._suffix = framed[:at], framed[at + len(bare) :]

    @property
    def specials(self) -> int:
        """How many special tokens frame a text."""
        return len(self._prefix) + len(self._suffix)

    def tokenize(self, texts: Iterable[str], *, space_before: bool = False) -> TokenColumn:
        """Token ids of texts, without special tokens, each cut to the model's length."""
        lead, limit = " " if space_before else "", self.max_length
        texts = list(texts)
        parts, full = [], np.zeros(len(texts), dtype=np.int64)
        # A piece at a time: what the tokenizer says of a text, with offsets and the like, takes some kilobytes.
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = [lead + text for text in texts[start : start + _TEXTS_AT_ONCE]]
            rows = [encoding.ids for encoding in self._backend.encode_batch_fast(some, add_special_tokens=False)]
            full[start : start + len(rows)] = [len(row) for row in rows]
            if self.truncation == "head":
                parts.append(Ragged.of([row[:limit] for row in rows]))
            else:
                parts.append(Ragged.of([row[-limit:] for row in rows]))
        return TokenColumn(Ragged.joined(parts), full)

    def encode_whole(self, texts: Iterable[str]) -> Encoded:
        """Encode plain texts without losing a token: long ones are cut into pieces of equal length, a row each."""
        room = self.max_length - self.specials
        texts, parts = list(texts), []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            rows: list[list[int]] = []
            for encoding in self._backend.encode_batch_fast(
                texts[start : start + _TEXTS_AT_ONCE], add_special_tokens=False
            ):
                ids = encoding.ids
                pieces = -(-len(ids) // room)
                cuts = [len(ids) * piece // max(pieces, 1) for piece in range(pieces + 1)]
                rows += [[*self._prefix, *ids[a:b], *self._suffix] for a, b in itertools.pairwise(cuts)]
            parts.append(Ragged.of(rows))
        tokens = Ragged.joined(parts)
        own = np.ones(len(tokens.values), dtype=np.bool_)
        for offset in range(len(self._prefix)):
            own[tokens.offsets[:-1] + offset] = False
        for offset in range(len(self._suffix)):
            own[tokens.offsets[1:] - 1 - offset] = False
        return Encoded(tokens, np.zeros((len(tokens), 0), np.int64), own, np.zeros(len(tokens), np.bool_))

    def _layout(self, template: Template) -> list[TokenIds | Slot | Mask]:
        """The template with its literal parts as token ids."""
        layout: list[TokenIds | Slot | Mask] = []
        space = False
        for part in template.parts:
            if isinstance(part, Literally):
                space = part.text.endswith(" ")
                text = part.text.rstrip(" ")
                if text:
                    layout.append(self.tokenize([text]).tokens.values)
            elif isinstance(part, Column):
                layout.append(Slot(part.name, space))
                space = False
            else:
                layout.append(part)
                space = False
        return layout

    def _fixed(self, layout: Sequence[TokenIds | Slot | Mask], masks: int) -> int:
        """Tokens that are not a row's own text."""
        literal = sum(len(part) for part in layout if isinstance(part, np.ndarray))
        return self.specials + literal + masks * sum(isinstance(part, Mask) for part in layout)

    def fixed_length(self, template: Template, masks: int = 1) -> int:
        """Tokens that the template takes before any row's text, special tokens included."""
        return self._fixed(self._layout(template), masks)

    def encode(
        self,
        template: Template,
        columns: Mapping[str, Sequence[str]],
        *,
        masks: int = 1,
        cache: dict[Slot, TokenColumn] | None = None,
    ) -> Encoded:
        """Encode rows.

        Args:
            template: a pattern, or a template without a mask.
            columns: for each column of the template, the texts, all of one length.
            masks: how many mask tokens the slot takes.
            cache: pass one dictionary to share the columns' tokens among templates over the same rows.

        Raises:
            InputError: the template alone fills the model's length.
        """
        cache = {} if cache is None else cache
        layout = self._layout(template)
        fixed = self._fixed(layout, masks)
        slots = [part for part in layout if isinstance(part, Slot)]
        room = self.max_length - fixed
        if room < len(slots):
            raise InputError(
                f"the pattern {template.source!r} takes {fixed} tokens of the {self.max_length} that the "
                "model reads and leaves no room for the text",
                fix="shorten the pattern or raise training.max_length",
            )
        for slot in slots:
            if slot not in cache:
                cache[slot] = self.tokenize(columns[slot.column], space_before=slot.space_before)
        columns_of = [cache[slot] for slot in slots]
        shares, shortened = self._shares(columns_of, room)
        rows = len(shortened)
        # What stands in each row, part by part: constant ids, or as much of a column's text as its share.
        prefix, suffix = (np.asarray(part, dtype=np.int32) for part in (self._prefix, self._suffix))
        slot_ids = np.full(masks, self.tokenizer.mask_token_id, dtype=np.int32)
        parts = [prefix, *(slot_ids if isinstance(part, Mask) else part for part in layout), suffix]
        share_of = iter(shares)
        lengths = [
            next(share_of) if isinstance(part, Slot) else np.full(rows, len(part), dtype=np.int64) for part in parts
        ]
        offsets = offsets_of(np.sum(lengths, axis=0))
        values, own = np.empty(int(offsets[-1]), dtype=np.int32), np.zeros(int(offsets[-1]), dtype=np.bool_)
        mask_at = np.zeros((rows, masks if template.has_mask else 0), dtype=np.int64)
        for start in range(0, rows, _ROWS_AT_ONCE):  # where each token goes takes several times the tokens' memory
            some = slice(start, start + _ROWS_AT_ONCE)
            begins, at, behind = offsets[:-1][some], offsets[:-1][some].copy(), iter(columns_of)
            for part, length in zip(parts, (length[some] for length in lengths), strict=True):
                if isinstance(part, Slot):
                    tokens = next(behind).tokens
                    kept = tokens.offsets[:-1][some]
                    if self.truncation == "tail":
                        kept = tokens.offsets[1:][some] - length
                    places = spread(at, length)
                    values[places] = tokens.values[spread(kept, length)]
                    own[places] = True
                else:
                    values[at[:, None] + np.arange(len(part))] = part
                    if part is slot_ids:
                        mask_at[some] = (at - begins)[:, None] + np.arange(masks)
                at += length
        return Encoded(Ragged(values, offsets), mask_at, own, shortened)

    def _shares(self, columns: Sequence[TokenColumn], room: int) -> tuple[list[Numbers], npt.NDArray[np.bool_]]:
        """How many tokens of each column each row keeps, and which rows are shortened."""
        full = np.sum([column.full_lengths for column in columns], axis=0)
        shares = [column.tokens.lengths for column in columns]
        shortened: npt.NDArray[np.bool_] = full > room
        for row in np.flatnonzero(shortened):
            fair = fair_shares([int(share[row]) for share in shares], room)
            for share, given in zip(shares, fair, strict=True):
                share[row] = given
        return shares, shortened
