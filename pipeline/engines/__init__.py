"""Where stages that run a model are executed.

An engine takes requests (`pipeline.plan.Call.request`) and leaves artifacts in the store; keys, store and bytes
are the same on each. Whatever the engine, a stage runs in a `pipeline.worker.StageProcess`, so that time-outs,
running out of memory and stopping work alike; and it is asked only for what the store does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipeline.progress import Progress, part_of

Request = Mapping[str, Any]


class Engine(Protocol):
    """Runs stages somewhere; its methods are called from several threads."""

    def run(self, title: str, requests: Sequence[Request], progress: Progress) -> list[dict[str, Any]]:
        """Run some stages one behind the other, and wait for them.

        Args:
            title: what they do together, for people.
            requests: one for each stage.
            progress: called with work done and work in all, where the engine can tell.

        Returns:
            ``seconds`` and ``built`` for each.

        Raises:
            InputError: the user's data is at fault.
            StageFailed: a stage failed.
            StageLost: its process went away (or one of its kinds); trying again may go better.
        """
        ...

    def close(self) -> None:
        """Stop whatever runs, at once."""
        ...


def in_turn(
    run: Callable[[Request, Progress], dict[str, Any]], requests: Sequence[Request], progress: Progress
) -> list[dict[str, Any]]:
    """Run requests one behind the other, with the progress of the whole.

    Each request counts alike; a single one reports its own steps.
    """
    if len(requests) == 1:
        return [run(requests[0], progress)]
    total = len(requests) * 1000
    results = [run(request, part_of(progress, 1000 * i, 1000, total)) for i, request in enumerate(requests)]
    progress(total, total)
    return results
