"""How work tells how far it is: a function that is called with what is done and what there is in all."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]


def part_of(progress: Progress, start: int, share: int, total: int) -> Progress:
    """Progress of a part, however it counts, as progress of the whole.

    Args:
        progress: hears of the whole.
        start: where in the whole the part begins.
        share: how much of the whole it is.
        total: the whole.
    """
    return lambda done, of: progress(start + share * done // max(of, 1), total)
