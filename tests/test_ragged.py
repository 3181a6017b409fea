"""Rows of different lengths in one flat array."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ragged import Ragged, spread

rows_of_tokens = st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=12)


@given(rows_of_tokens)
def test_rows_come_out_as_they_went_in(rows: list[list[int]]) -> None:
    ragged = Ragged.of(rows)
    assert [row.tolist() for row in ragged] == rows
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert ragged.values.dtype == np.int32


@given(st.lists(rows_of_tokens, max_size=4))
def test_parts_are_joined_in_order(parts: list[list[list[int]]]) -> None:
    joined = Ragged.joined([Ragged.of(part) for part in parts])
    assert [row.tolist() for row in joined] == [row for part in parts for row in part]


@given(rows_of_tokens)
def test_equal_rows_are_one_kind_led_by_the_first(rows: list[list[int]]) -> None:
    first, kind = Ragged.of(rows).distinct()
    assert [rows.index(row) for row in rows] == [int(first[k]) for k in kind]
    assert len(first) == len({tuple(row) for row in rows})


@given(rows_of_tokens.filter(bool), st.data())
def test_chosen_rows_are_filled_up_on_the_right(rows: list[list[int]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    table, own = Ragged.of(rows).padded(np.array(chosen, dtype=np.int64), 9)
    longest = max((len(rows[i]) for i in chosen), default=0)
    assert table.tolist() == [rows[i] + [9] * (longest - len(rows[i])) for i in chosen]
    assert own.tolist() == [[j < len(rows[i]) for j in range(longest)] for i in chosen]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=10))
def test_runs_are_spread_one_after_the_other(runs: list[tuple[int, int]]) -> None:
    starts, lengths = (np.array([run[i] for run in runs], dtype=np.int64) for i in (0, 1))
    assert spread(starts, lengths).tolist() == [at for start, length in runs for at in range(start, start + length)]
