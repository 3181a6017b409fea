"""Which of many rows repeat, by 64-bit hashes, in bounded memory: what grows with the rows lies on disk.

Hashes go to a nameless file that is memory-mapped; equal ones are found a range of hashes at a time.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.ragged import Numbers

Hashes = npt.NDArray[np.uint64]
_CHUNK = 1_000_000  # rows looked at together: some tens of megabytes


def hashes_of_hex(column: pa.Array) -> Hashes:
    """From strings of 16 hex digits."""
    return np.frombuffer(bytes.fromhex("".join(column.to_pylist())), dtype=">u8").astype(np.uint64)


def hex_of(value: int) -> str:
    """Back to 16 hex digits."""
    return f"{value:016x}"


def hashes_of_texts(texts: Iterable[str]) -> Hashes:
    """64 bits of the BLAKE2b hash of each text."""
    digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def on_disk(shape: tuple[int, ...], dtype: npt.DTypeLike, folder: Path) -> npt.NDArray[Any]:
    """An array of zeros in a nameless file below a folder, gone with the array."""
    if 0 in shape:
        return np.zeros(shape, dtype=dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        # A full disk is an error here; a write to a mapping without room behind it kills the process.
        os.posix_fallocate(file.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "r+", shape=shape)


def gather(parts: Iterable[Hashes], folder: Path) -> Hashes:
    """Hashes one after the other, in a nameless file below a folder."""
    with tempfile.TemporaryFile(dir=folder) as file:
        for part in parts:
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        rows = file.tell() // np.dtype(np.uint64).itemsize
        return np.memmap(file, np.uint64, "r", shape=(rows,)) if rows else np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class Repeats:
    """What repeats among rows.

    Attributes:
        occurrence: int32 ``[rows]``, how often a row's hash has come so far, itself included.
        group: int32 ``[rows]``, a number for each hash that comes more than once, -1 for one that does not.
        groups: how many such hashes there are.
        repeated: how many rows come after the first of their hash.
    """

    occurrence: npt.NDArray[np.int32]
    group: npt.NDArray[np.int32]
    groups: int
    repeated: int


def find_repeats(hashes: Hashes, folder: Path) -> Repeats:
    """Number the rows of each hash.

    Args:
        hashes: see `gather`.
        folder: where nameless files of 8 bytes a row are made.
    """
    occurrence, group = (on_disk((len(hashes),), np.int32, folder) for _ in range(2))
    ranges, groups, repeated = max(-(-len(hashes) // _CHUNK), 1), 0, 0
    for number in range(ranges):
        # Distinct hashes spread evenly, so that a range is one piece unless some hash comes again and again.
        pieces = _pieces(hashes, number, ranges)
        first = list(islice(pieces, 2))
        distinct, counts = _counted(hashes, chain(first, pieces))
        several = counts > 1
        numbers = np.where(several, groups + np.cumsum(several) - 1, -1)
        before = np.zeros(len(distinct), dtype=np.int64)
        for at in first if len(first) < 2 else _pieces(hashes, number, ranges):
            mine = hashes[at]
            order = np.argsort(mine, kind="stable")
            at, mine = at[order], mine[order]
            begins = np.flatnonzero(np.diff(mine, prepend=~mine[:1]))
            sizes = np.diff(begins, append=len(mine))
            which = np.searchsorted(distinct, mine[begins])
            occurrence[at] = np.arange(len(mine)) - np.repeat(begins - before[which], sizes) + 1
            group[at] = np.repeat(numbers[which], sizes)
            before[which] += sizes
        groups += int(several.sum())
        repeated += int(counts.sum()) - len(counts)
    return Repeats(occurrence, group, groups, repeated)


def _counted(hashes: Hashes, pieces: Iterable[Numbers]) -> tuple[Hashes, Numbers]:
    """The distinct hashes of some rows, ascending, and how often each comes."""
    distinct, counts = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    for at in pieces:
        new, often = np.unique(hashes[at], return_counts=True)
        distinct, place = np.unique(np.concatenate([distinct, new]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, often])).astype(np.int64)
    return distinct, counts


def _pieces(hashes: Hashes, number: int, ranges: int) -> Iterator[Numbers]:
    """The rows whose hash lies in one of some equal ranges, no more than some two chunks of them at once."""
    held, rows = list[Numbers](), 0
    for start in range(0, len(hashes), _CHUNK):
        # The upper half of a hash as a fraction of 2**32 says which range it is in.
        upper = hashes[start : start + _CHUNK] >> np.uint64(32)
        held.append(np.flatnonzero((upper * np.uint64(ranges)) >> np.uint64(32) == number) + start)
        rows += len(held[-1])
        if rows > 1.2 * _CHUNK:
            yield np.concatenate(held)
            held, rows = [], 0
    if held:
        yield np.concatenate(held)
