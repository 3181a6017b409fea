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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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
        at = np.concatenate([np.zeros(0, dtype=np.int64), *_in_range(hashes, number, ranges)])
        mine = hashes[at]
        order = np.argsort(mine, kind="stable")
        at, mine = at[order], mine[order]
        begins = np.flatnonzero(np.diff(mine, prepend=~mine[:1]))
        sizes = np.diff(begins, append=len(mine))
        occurrence[at] = np.arange(len(mine)) - np.repeat(begins, sizes) + 1
        several = sizes > 1
        numbers = np.where(several, groups + np.cumsum(several) - 1, -1)
        group[at] = np.repeat(numbers, sizes)
        groups += int(several.sum())
        repeated += len(mine) - len(sizes)
    return Repeats(occurrence, group, groups, repeated)


def _in_range(hashes: Hashes, number: int, ranges: int) -> Iterator[npt.NDArray[np.int64]]:
    """The rows whose hash lies in one of some equal ranges, chunk by chunk."""
    for start in range(0, len(hashes), _CHUNK):
        # The upper half of a hash as a fraction of 2**32 says which range it is in.
        upper = hashes[start : start + _CHUNK] >> np.uint64(32)
        yield np.flatnonzero((upper * np.uint64(ranges)) >> np.uint64(32) == number) + start
