"""How work tells how far it is: a function that is called with what is done and what there is in all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

Progress = Callable[[int, int], None]
Part = TypeVar("Part", bound=Sized)


def part_of(progress: Progress, start: int, share: int, total: int) -> Progress:
    """Progress of a part, however it counts, as progress of the whole.

    Args:
        progress: hears of the whole.
        start: where in the whole the part begins.
        share: how much of the whole it is.
        total: the whole.
    """
    return lambda done, of: progress(start + share * done // max(of, 1), total)


def told(parts: Iterable[Part], progress: Progress, total: int, start: int = 0) -> Iterator[Part]:
    """The parts as they come, each told as done once the next is asked for.

    Args:
        parts: batches of rows.
        progress: hears of the whole.
        total: the rows of the whole.
        start: how many of them come before these parts.
    """
    for part in parts:
        yield part
        start += len(part)
        progress(start, total)
