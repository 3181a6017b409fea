"""Which tokens masked-language modelling hides, and behind what (Devlin et al. 2019).

Only a row's own text is hidden: never padding, special tokens, the slot or the pattern's own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.ragged import Numbers, Ragged, offsets_of, spread
from pipeline.template import Encoded

SHARE = 0.15
_MASKED, _KEPT = 0.8, 0.9  # below the first a mask token, above the second a random token, between them itself


@dataclass(frozen=True)
class Masked:
    """Rows with some of their tokens hidden.

    Attributes:
        tokens: what the model reads.
        columns: int64 ``[hidden]``, where in its row each hidden token stands, row by row.
        targets: int64 ``[hidden]``, what stood there.
        first: int64 ``[rows + 1]``, where each row begins in ``columns`` and ``targets``.
    """

    tokens: Ragged
    columns: Numbers
    targets: Numbers
    first: Numbers

    @property
    def rows(self) -> Numbers:
        """The rows that have a hidden token."""
        return np.flatnonzero(np.diff(self.first))

    def of(self, rows: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """The hidden tokens of some rows: their place in ``rows``, their column, their target."""
        counts = self.first[rows + 1] - self.first[rows]
        mine = spread(self.first[rows], counts)
        return np.repeat(np.arange(len(rows)), counts), self.columns[mine], self.targets[mine]


def inside_words(tokenizer: Any) -> npt.NDArray[np.bool_]:
    """Which tokens of a vocabulary go on with the word of the token before them, bool ``[vocabulary]``.

    WordPiece marks those that do (``##ing``), byte-level BPE and SentencePiece those that don't (a space, written
    ``Ġ`` or ``▁``); punctuation is a word of its own everywhere. Scripts without spaces become one long word.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
        return np.array([piece.startswith("##") for piece in pieces])
    return np.array([piece[:1].isalnum() and not piece.startswith(("Ġ", "▁")) for piece in pieces])


def mask(
    encoded: Encoded,
    mask_id: int,
    vocabulary: int,
    random: np.random.Generator,
    share: float = SHARE,
    inside: npt.NDArray[np.bool_] | None = None,
) -> Masked:
    """Hide a share of the rows' own tokens; a row that has any loses one at least.

    Args:
        encoded: one row at least.
        mask_id: the mask token.
        vocabulary: random tokens are drawn below this number.
        random: where the draws come from.
        share: of the tokens, or of the words.
        inside: what `inside_words` gives: a word's tokens are then hidden together (whole-word masking).
    """
    tokens = encoded.tokens
    draws = random.random(len(encoded.own))
    if inside is not None:
        goes_on = encoded.own & inside[tokens.values]
        goes_on[1:] &= encoded.own[:-1]  # a word does not go on from a pattern or a special token
        goes_on[tokens.offsets[:-1]] = False
        draws = draws[np.maximum.accumulate(np.where(goes_on, 0, np.arange(len(draws))))]
    draws = np.where(encoded.own, draws, np.inf)
    least = np.minimum.reduceat(draws, tokens.offsets[:-1])  # special tokens frame each row: none is empty
    limits = np.repeat(np.maximum(least, share), tokens.lengths)
    hidden = np.flatnonzero(encoded.own & (draws <= limits))
    counts = np.bincount(np.searchsorted(tokens.offsets, hidden, side="right") - 1, minlength=len(tokens))
    fate, values = random.random(len(hidden)), tokens.values.copy()
    values[hidden[fate < _MASKED]] = mask_id
    swapped = hidden[fate >= _KEPT]
    values[swapped] = random.integers(0, vocabulary, len(swapped))
    return Masked(
        Ragged(values, tokens.offsets),
        hidden - np.repeat(tokens.offsets[:-1], counts),
        tokens.values[hidden].astype(np.int64),
        offsets_of(counts),
    )
