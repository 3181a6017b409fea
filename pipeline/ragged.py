"""Rows of different lengths in one flat array: no object a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """Token ids of rows.

    Attributes:
        values: int32, of all rows, one after the other.
        offsets: int64 ``[rows + 1]``, where each row begins.
    """

    values: TokenIds
    offsets: Numbers

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | TokenIds]) -> Ragged:
        """From a sequence a row."""
        offsets = offsets_of([len(row) for row in rows])
        values = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(offsets[-1]))
        return cls(values, offsets)

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of several, one after the other."""
        lengths = [part.lengths for part in parts]
        return cls(
            np.concatenate([np.zeros(0, dtype=np.int32), *(part.values for part in parts)]),
            offsets_of(np.concatenate([np.zeros(0, dtype=np.int64), *lengths])),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> TokenIds:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[TokenIds]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> Numbers:
        """int64 ``[rows]``."""
        return np.diff(self.offsets)

    def distinct(self) -> tuple[Numbers, Numbers]:
        """The first row of each kind, and which of them each row equals: int64 ``[kinds]`` and ``[rows]``."""
        first: dict[bytes, int] = {}
        kinds = np.fromiter((first.setdefault(self[i].tobytes(), i) for i in range(len(self))), np.int64, len(self))
        found, position = np.unique(kinds, return_inverse=True)
        return found, position

    def padded(self, rows: npt.NDArray[np.integer], fill: int) -> tuple[TokenIds, npt.NDArray[np.bool_]]:
        """Some rows, filled up on the right to the longest of them.

        Returns:
            int32 ``[rows, longest]``, and which places hold a row's own values.
        """
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        columns = np.arange(lengths.max(initial=0))
        own = columns < lengths[:, None]
        table = np.full(own.shape, fill, dtype=np.int32)
        table[own] = self.values[(self.offsets[rows, None] + columns)[own]]
        return table, own


def offsets_of(lengths: Sequence[int] | Numbers) -> Numbers:
    """Where rows of given lengths begin, and where the last one ends: int64 ``[rows + 1]``."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def spread(starts: Numbers, lengths: Numbers) -> Numbers:
    """The places of runs, one run after the other.

    >>> spread(np.array([5, 20]), np.array([2, 3])).tolist()
    [5, 6, 20, 21, 22]
    """
    return np.repeat(starts - offsets_of(lengths)[:-1], lengths) + np.arange(int(lengths.sum()))
