"""How a run tells whoever watches it (the command line's progress bars) what it is doing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from pipeline.plan import Call, Plan


class Observer(Protocol):
    """Called from the run's threads."""

    def planned(self, plan: Plan, to_build: list[Call]) -> None:
        """The plan stands."""

    def started(self, key: str, title: str) -> None:
        """A stage began to run."""

    def progressed(self, key: str, done: int, total: int) -> None:
        """A stage got on."""

    def built(self, key: str, title: str, seconds: float) -> None:
        """A stage ran to its end."""

    def lost(self, key: str) -> None:
        """A stage that had begun failed; it may be tried again."""

    def waiting(self, text: str) -> None:
        """The run waits for another one."""

    def finished(self, title: str) -> None:
        """A stage's artifact is there, built or cached."""


class Silent:
    """Nobody watches."""

    def planned(self, plan: Plan, to_build: list[Call]) -> None:
        """Say nothing."""

    def started(self, key: str, title: str) -> None:
        """Say nothing."""

    def progressed(self, key: str, done: int, total: int) -> None:
        """Say nothing."""

    def built(self, key: str, title: str, seconds: float) -> None:
        """Say nothing."""

    def lost(self, key: str) -> None:
        """Say nothing."""

    def waiting(self, text: str) -> None:
        """Say nothing."""

    def finished(self, title: str) -> None:
        """Say nothing."""


_current: Observer = Silent()


def current() -> Observer:
    """Who watches this process's runs."""
    return _current


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Let an observer watch the runs of this block."""
    global _current
    before, _current = _current, observer
    try:
        yield
    finally:
        _current = before
