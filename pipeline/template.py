"""Patterns: a cloze template over the task's columns.

The language is as small as it can be: ``{column}`` stands for a column, ``{mask}`` for the slot that the
language model fills, ``{{`` and ``}}`` for literal braces, and everything else for itself. A template with one
``{mask}`` is a pattern (Schick & Schütze 2021, section 3); one without is what a plain classifier reads.

When a rendered text is longer than the model reads, only the columns' text is shortened, never the pattern
and never the mask. Several columns share the room max-min fairly: each gets an equal share, and what a short
column leaves over goes to the longer ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError

MASK = "mask"
Truncation = Literal["head", "tail"]
TokenIds = npt.NDArray[np.int32]


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


class TokenColumn:
    """One column of a table, tokenised: ragged token ids, at most ``limit`` of each text kept.

    Args:
        ids: int32 token ids of all rows, one after the other.
        offsets: int64 ``[rows + 1]``, where each row begins.
        full_lengths: int32 ``[rows]``, the tokens that each text had before the limit.
    """

    def __init__(self, ids: TokenIds, offsets: npt.NDArray[np.int64], full_lengths: TokenIds) -> None:
        self.ids, self.offsets, self.full_lengths = ids, offsets, full_lengths

    def __getitem__(self, row: int) -> TokenIds:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]


@dataclass(frozen=True)
class Slot:
    """A column's place among token ids, and whether its text is tokenised with a space before it."""

    column: str
    space_before: bool


@dataclass(frozen=True)
class Encoded:
    """Rows ready for a model, ragged.

    Attributes:
        input_ids: one int32 array a row, special tokens included.
        mask_at: int32 ``[rows, masks]``, where the mask tokens stand; ``masks`` is 0 without a slot.
        pattern_at: for each row a bool array, true where the token belongs to the pattern, the slot or the
            special tokens, false where it is the row's own text. Masked-language modelling stays off the
            former.
        shortened: bool ``[rows]``, true where text was cut.
    """

    input_ids: list[TokenIds]
    mask_at: TokenIds
    pattern_at: list[npt.NDArray[np.bool_]]
    shortened: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.input_ids)


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
        lead = " " if space_before else ""
        encodings = self._backend.encode_batch_fast([lead + text for text in texts], add_special_tokens=False)
        limit = self.max_length
        rows: list[list[int]] = []
        full = np.zeros(len(encodings), dtype=np.int32)
        for i, encoding in enumerate(encodings):
            ids = encoding.ids
            full[i] = len(ids)
            rows.append(ids[:limit] if self.truncation == "head" else ids[-limit:])
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1]))
        return TokenColumn(flat, offsets, full)

    def _layout(self, template: Template) -> list[TokenIds | Slot | Mask]:
        """The template with its literal parts as token ids."""
        layout: list[TokenIds | Slot | Mask] = []
        space = False
        for part in template.parts:
            if isinstance(part, Literally):
                space = part.text.endswith(" ")
                text = part.text.rstrip(" ")
                if text:
                    layout.append(self.tokenize([text]).ids)
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
        tokens = [cache[slot] for slot in slots]
        rows = len(columns[template.columns[0]])
        prefix, suffix = (np.asarray(part, dtype=np.int32) for part in (self._prefix, self._suffix))
        input_ids: list[TokenIds] = []
        pattern_at: list[npt.NDArray[np.bool_]] = []
        mask_at = np.zeros((rows, masks if template.has_mask else 0), dtype=np.int32)
        shortened = np.zeros(rows, dtype=np.bool_)
        slot_ids = np.full(masks, self.tokenizer.mask_token_id, dtype=np.int32)
        for row in range(rows):
            texts = [column[row] for column in tokens]
            full = sum(int(column.full_lengths[row]) for column in tokens)
            if full > room:
                shortened[row] = True
                shares = fair_shares([len(text) for text in texts], room)
                head = self.truncation == "head"
                texts = [
                    text[:share] if head else text[len(text) - share :]
                    for text, share in zip(texts, shares, strict=True)
                ]
            pieces, fixed_flags = [prefix], [True]
            behind = iter(texts)
            length = len(prefix)
            for part in layout:
                if isinstance(part, Mask):
                    mask_at[row] = np.arange(length, length + masks)
                    piece = slot_ids
                else:
                    piece = next(behind) if isinstance(part, Slot) else part
                pieces.append(piece)
                fixed_flags.append(not isinstance(part, Slot))
                length += len(piece)
            pieces.append(suffix)
            fixed_flags.append(True)
            input_ids.append(np.concatenate(pieces))
            pattern_at.append(np.repeat(fixed_flags, [len(piece) for piece in pieces]))
        return Encoded(input_ids, mask_at, pattern_at, shortened)
