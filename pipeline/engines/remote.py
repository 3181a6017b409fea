"""What the engines on other machines have in common: running requests where they arrive, and telling how it went."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.engines import Request, in_turn
from pipeline.errors import ClozelineError, InputError, StageFailed, rebuilt
from pipeline.progress import Progress
from pipeline.worker import StageProcess


def run_here(
    requests: Sequence[Request], progress: Progress, began: Callable[[StageProcess], None] = lambda process: None
) -> dict[str, Any]:
    """Run requests in a stage process of this machine.

    Args:
        requests: one for each stage.
        progress: called with work done and work in all.
        began: given the process, for whoever may have to stop it.

    Returns:
        ``results``, or ``error`` with the kind and the text: plain JSON, so that it needs no class at the other end.
    """
    try:
        with StageProcess() as process:
            began(process)
            return {"results": in_turn(process.run, requests, progress)}
    except ClozelineError as error:
        return {"error": [type(error).__name__, str(error)]}
    except OSError as error:  # no process could be started
        return {"error": [StageFailed.__name__, f"{type(error).__name__}: {error}"]}


def results_of(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """The results in what `run_here` returned.

    Raises:
        ClozelineError: what it reported.
    """
    if "error" in outcome:
        raise rebuilt(*outcome["error"])
    return list(outcome["results"])


def imported(module: str, engine: str) -> Any:
    """The module that an engine is built on.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"the engine {engine} needs {engine.capitalize()}", where="engine", fix=f"pip install 'clozeline[{engine}]'"
        ) from None
