"""Verbalizers: from label words to token ids.

A label may have several words and a word several tokens. A word of n tokens is scored with n masks in the
slot; the words of one task are grouped by n, so that each group takes one batched pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError


@dataclass(frozen=True)
class Word:
    """A label word: its text, its label's number and its token ids."""

    text: str
    label: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Verbalizer:
    """The label words of a pattern.

    Attributes:
        labels: how many labels there are.
        words: all words, in the labels' order.
    """

    labels: int
    words: tuple[Word, ...]

    @property
    def widths(self) -> list[int]:
        """The distinct token counts of its words, ascending: one pass each."""
        return sorted({len(word.ids) for word in self.words})

    @classmethod
    def resolve(cls, words: Mapping[str, Sequence[str]], tokenizer: Any, *, where: str = "labels") -> Verbalizer:
        """Find the token ids of label words as they stand behind a space.

        Args:
            words: for each label its words, in the labels' order.
            tokenizer: a fast tokenizer.
            where: what errors name.

        Raises:
            InputError: a word is empty, unknown to the tokenizer, or shared by two labels.
        """
        resolved: list[Word] = []
        owner: dict[tuple[int, ...], tuple[str, str]] = {}
        for number, (label, texts) in enumerate(words.items()):
            for text in texts:
                ids = _ids_of(text, tokenizer)
                place = f"{where}, label {label!r}"
                if not ids:
                    raise InputError(f"the label word {text!r} is empty", where=place, fix="give it a word")
                if tokenizer.unk_token_id in ids:
                    raise InputError(
                        f"the tokenizer does not know the label word {text!r}",
                        where=place,
                        fix="choose another word",
                    )
                if ids in owner:
                    other, other_text = owner[ids]
                    if other == label:
                        raise InputError(f"the label word {text!r} stands there twice", where=place, fix="drop one")
                    raise InputError(
                        f"the label word {text!r} is shared by {label!r} and {other!r}"
                        + (f" (there as {other_text!r}: the model reads both alike)" if text != other_text else ""),
                        where=place,
                        fix="give each label words of its own",
                    )
                owner[ids] = (label, text)
                resolved.append(Word(text, number, ids))
        return cls(len(words), tuple(resolved))


def _ids_of(word: str, tokenizer: Any) -> tuple[int, ...]:
    """A word's tokens as they stand in running text: behind a space where the tokenizer marks that."""
    if not word.strip():
        return ()
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may come with padding to a fixed length
    backend.no_padding()
    backend.encode_special_tokens = True
    return tuple(backend.encode(" " + word.strip(), add_special_tokens=False).ids)
