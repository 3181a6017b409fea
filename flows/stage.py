"""The flow that a GPU worker runs: some stages of another flow's run, in one process that holds the device."""

from __future__ import annotations

import json
from typing import Annotated, Any

from prefect import flow
from prefect.states import Completed, Failed, State

from flows.parameters import shown
from flows.progress import ProgressArtifact
from flows.storage import use_storage_block
from flows.worker import end_with_worker
from pipeline.engines.remote import run_here
from pipeline.errors import ClozelineError


@flow(name="stage", flow_run_name="{title}", description=__doc__)
def stage(
    title: Annotated[str, shown("What it does", "The name of the run.")],
    requests: Annotated[list[dict[str, Any]], shown("Requests", "pipeline.plan.Call.request of each stage.")],
    storage_block: Annotated[str | None, shown("Storage block", "As in the flow label.")] = None,
) -> State[Any]:
    """Run stages one behind the other.

    Returns:
        Completed, with the results as JSON in its message; or Failed, named after the kind of the error, with its
        text. Both are for `flows.pool`: a state travels through the server alone, wherever results are kept.
    """
    end_with_worker()
    try:
        use_storage_block(storage_block)
        outcome = run_here(requests, ProgressArtifact(title, requests[0]["key"]))
    except ClozelineError as error:
        return Failed(name=type(error).__name__, message=str(error))
    if "error" in outcome:
        kind, message = outcome["error"]
        return Failed(name=kind, message=message)
    return Completed(message=json.dumps(outcome["results"]))
