"""What masked-language modelling hides."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.masking import SHARE, mask
from pipeline.ragged import Ragged
from pipeline.template import Encoded

MASK, VOCABULARY = 4, 100
# True where a token is of the row's own text; special tokens frame each row.
rows_of_flags = st.lists(
    st.lists(st.booleans(), max_size=20).map(lambda flags: [False, *flags, False]), min_size=1, max_size=8
)


def encoded(rows: list[list[bool]]) -> Encoded:
    """Rows in which each token is a number of its own, above all that may be drawn."""
    tokens = Ragged.of(rows)
    values = np.arange(len(tokens.values), dtype=np.int32) + VOCABULARY
    own = np.array([flag for row in rows for flag in row])
    none = np.zeros((len(rows), 0), dtype=np.int64)
    return Encoded(Ragged(values, tokens.offsets), none, own, np.zeros(len(rows), dtype=np.bool_))


@given(rows_of_flags, st.integers(0, 2**32))
def test_only_a_rows_own_tokens_are_hidden_and_at_least_one_of_them(rows: list[list[bool]], seed: int) -> None:
    given_rows = encoded(rows)
    masked = mask(given_rows, MASK, VOCABULARY, np.random.default_rng(seed))
    assert masked.tokens.lengths.tolist() == given_rows.tokens.lengths.tolist()
    everything = np.arange(len(rows))
    found = list(zip(*(part.tolist() for part in masked.of(everything)), strict=True))
    assert {row for row, _, _ in found} == {i for i, row in enumerate(rows) if any(row)} == set(masked.rows.tolist())
    for row, column, target in found:
        assert rows[row][column]
        assert given_rows.tokens[row][column] == target
    hidden = {(row, column) for row, column, _ in found}
    for i, row in enumerate(masked.tokens):
        for j, token in enumerate(row.tolist()):
            assert (i, j) in hidden or token == given_rows.tokens[i][j]


def test_shares_are_those_of_the_paper() -> None:
    given_rows = encoded([[False, *[True] * 100, False]] * 400)
    masked = mask(given_rows, MASK, VOCABULARY, np.random.default_rng(0))
    hidden = len(masked.targets)
    assert abs(hidden / 40_000 - SHARE) < 0.01
    read = np.concatenate(
        [masked.tokens[row][masked.columns[start:stop]] for row, (start, stop) in enumerate(_spans(masked.first))]
    )
    assert abs((read == MASK).sum() / hidden - 0.8) < 0.02  # a random token may be the mask token, too
    assert abs((read == masked.targets).sum() / hidden - 0.1) < 0.02


def _spans(first: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(first[:-1].tolist(), first[1:].tolist(), strict=True))


@given(rows_of_flags, st.data())
def test_hidden_tokens_of_some_rows_are_numbered_by_their_place_among_them(
    rows: list[list[bool]], data: st.DataObject
) -> None:
    masked = mask(encoded(rows), MASK, VOCABULARY, np.random.default_rng(0))
    chosen = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True)), dtype=np.int64)
    places, columns, _ = masked.of(chosen)
    expected = [
        (place, int(column))
        for place, row in enumerate(chosen)
        for column in masked.columns[masked.first[row] : masked.first[row + 1]]
    ]
    assert list(zip(places.tolist(), columns.tolist(), strict=True)) == expected
