"""Which rows repeat, found a range of hashes at a time."""

from __future__ import annotations

import os
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import repeats
from pipeline.repeats import find_repeats, gather, hashes_of_hex, hashes_of_texts, hex_of, on_disk

few = st.sampled_from([0, 1, 2**31, 2**32, 2**63, 2**64 - 1])
many = st.lists(few | st.integers(0, 2**64 - 1), max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hashes=many, chunk=st.integers(1, 50), cuts=st.integers(1, 9))
def test_rows_are_numbered_within_their_hash(
    hashes: list[int], chunk: int, cuts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "_CHUNK", chunk)
    array = np.array(hashes, dtype=np.uint64)
    found = find_repeats(gather(np.array_split(array, cuts), tmp_path), tmp_path)
    counts, so_far = Counter(hashes), Counter[int]()
    groups: dict[int, int] = {}
    for value, occurrence, group in zip(hashes, found.occurrence.tolist(), found.group.tolist(), strict=True):
        so_far[value] += 1
        assert occurrence == so_far[value]
        assert (group >= 0) == (counts[value] > 1)
        if group >= 0:
            assert groups.setdefault(value, group) == group
    assert sorted(groups.values()) == list(range(found.groups))
    assert found.repeated == len(hashes) - len(counts)
    assert os.listdir(tmp_path) == []


def test_a_hash_that_comes_again_and_again_takes_no_more_memory_than_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "_CHUNK", 10_000)
    random = np.random.default_rng(0)

    def peak(rows: int, distinct: int) -> int:
        values = random.integers(0, 2**64, size=distinct, dtype=np.uint64)
        hashes = gather([values[random.integers(0, distinct, size=rows)]], tmp_path)
        tracemalloc.start()
        try:
            assert find_repeats(hashes, tmp_path).repeated == rows - len(np.unique(hashes))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1000, 1000)  # the first call imports
    assert peak(500_000, 1) < 2 * peak(500_000, 500_000)


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_hex_digits_and_hashes_are_one_and_the_same(values: list[int]) -> None:
    column = pa.array([hex_of(value) for value in values], pa.string())
    assert all(len(text) == 16 for text in column.to_pylist())
    assert hashes_of_hex(column).tolist() == values


def test_texts_that_differ_have_different_hashes() -> None:
    texts = ["", "a", "b", "ab", "\ud800", "é", "e\u0301"]
    assert len(set(hashes_of_texts(texts).tolist())) == len(texts)


def test_an_array_on_disk_leaves_no_name_behind(tmp_path: Path) -> None:
    array = on_disk((3, 2), np.float32, tmp_path)
    array[1] = 5
    assert array.tolist() == [[0, 0], [5, 5], [0, 0]]
    assert os.listdir(tmp_path) == []
    assert on_disk((0, 2), np.float32, tmp_path).shape == (0, 2)
