"""What the engines on other machines have in common: running requests where they arrive, and telling how it went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.engines import Progress, Request, in_turn
from pipeline.errors import ClozelineError, rebuilt
from pipeline.worker import StageProcess


def run_here(requests: Sequence[Request], progress: Progress, process: StageProcess) -> dict[str, Any]:
    """Run requests in a stage process of this machine.

    Returns:
        ``results``, or ``error`` with the kind and the text: plain JSON, so that it needs no class at the other end.
    """
    try:
        return {"results": in_turn(process.run, requests, progress)}
    except ClozelineError as error:
        return {"error": [type(error).__name__, str(error)]}


def results_of(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """The results in what `run_here` returned.

    Raises:
        ClozelineError: what it reported.
    """
    if "error" in outcome:
        raise rebuilt(*outcome["error"])
    return list(outcome["results"])
