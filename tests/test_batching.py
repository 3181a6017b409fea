"""Ragged rows to padded batches."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batching import (
    TOKEN_BUDGET,
    batch_share,
    by_length,
    pad,
    set_batch_share,
    split_by_length,
    steps_by_length,
)
from pipeline.ragged import Ragged

lengths_of_rows = st.lists(st.integers(0, 300), max_size=60)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def rows_in(batches: list[np.ndarray]) -> list[int]:
    return [i for batch in batches for i in batch.tolist()]


@given(lengths_of_rows, st.integers(1, 1000))
def test_steps_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = steps_by_length(lengths, budget)
    assert sorted(rows_in(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) > 0
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@given(st.lists(st.integers(0, 600), max_size=60), st.sampled_from([CPU, CUDA]))
def test_batches_hold_every_row_once_and_the_longest_first(lengths: list[int], device: torch.device) -> None:
    order = rows_in(by_length(lengths, device))
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)


def test_batches_for_a_cpu_are_full_up_to_the_length_from_which_attention_takes_the_memory() -> None:
    def sizes(length: int, device: torch.device) -> list[int]:
        return [len(batch) for batch in by_length([length] * 64, device)]

    assert sizes(64, CPU) == [64]
    assert sizes(128, CPU) == [32] * 2
    assert sizes(256, CPU) == [8] * 8
    assert sizes(512, CPU) == [2] * 32
    assert sizes(512, CUDA) == [64]


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=8))
def test_padding_stands_behind_each_row_and_is_masked(rows: list[list[int]]) -> None:
    ids, mask = pad(Ragged.of(rows), np.arange(len(rows)), 0, torch.device("cpu"))
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, padded, seen in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        assert padded == row + [0] * (len(padded) - len(row))
        assert seen == [1] * len(row) + [0] * (len(padded) - len(row))


def padded_tokens(lengths: list[int], parts: list[np.ndarray]) -> int:
    return sum(len(part) * max(lengths[i] for i in part) for part in parts)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=40))
def test_a_step_is_split_in_two_at_most_and_only_where_that_saves(lengths: list[int]) -> None:
    parts = split_by_length(lengths, CPU)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(lengths)))
    assert len(parts) in {1, 2}
    assert all(len(part) > 0 for part in parts)
    if len(parts) == 2:
        assert padded_tokens(lengths, parts) < len(lengths) * max(lengths)


def test_one_long_text_among_short_ones_goes_alone() -> None:
    parts = split_by_length([20] * 8 + [500] + [20] * 7, CPU)
    assert sorted(map(len, parts)) == [1, 15]
    assert [8] in [part.tolist() for part in parts]


def test_texts_of_one_length_stay_together() -> None:
    assert len(split_by_length([64] * 16, CPU)) == 1


def test_on_cuda_a_second_pass_costs_more_than_the_padding_of_few_rows_and_less_than_that_of_many() -> None:
    assert len(split_by_length([20] * 15 + [500], CUDA)) == 1
    assert len(split_by_length([20] * 63 + [500], CUDA)) == 2


@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=90), st.sampled_from([0.5, 0.25]), st.sampled_from([CPU, CUDA])
)
def test_half_batches_hold_every_row_once_in_pieces_of_that_share(
    lengths: list[int], share: float, device: torch.device
) -> None:
    set_batch_share(share)
    try:
        assert batch_share() == share
        pieces, batches = split_by_length(lengths, device), by_length(lengths, CPU)
    finally:
        set_batch_share(1.0)
    assert sorted(i for piece in pieces for i in piece.tolist()) == list(range(len(lengths)))
    assert max(len(piece) for piece in pieces) <= max(int(len(lengths) * share), 1)
    assert max(len(batch) * max(lengths[i] for i in batch) for batch in batches) <= TOKEN_BUDGET * share
