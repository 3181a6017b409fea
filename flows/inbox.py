"""The flow that looks once at the files of tasks and announces what has landed; made for a schedule."""

from __future__ import annotations

from typing import Annotated

from prefect import flow, get_run_logger

from flows.events import announce_changes, inbox_of, task_location
from flows.parameters import shown
from flows.storage import use_storage_block
from pipeline.errors import ClozelineError, InputError
from pipeline.settings import Settings


@flow(name="inbox", description=__doc__)
def inbox(
    tasks: Annotated[
        list[str],
        shown(
            "Task files",
            "Absolute paths, URLs, or paths relative to the worker's CLOZELINE_HOME.",
            examples=[["/data/tickets/task.yaml"]],
        ),
    ],
    storage_block: Annotated[str | None, shown("Storage block", "As in the flow label.")] = None,
) -> dict[str, list[str]]:
    """Look once at every task's files; a task that is in trouble keeps none of the others from being looked at.

    Returns:
        The new and changed files that were announced, by task.

    Raises:
        InputError: a task, or a file of one, is wrong; all are told at once, after the others were looked at.
        ClozelineError: the server did not answer.
    """
    use_storage_block(storage_block)
    logger, home = get_run_logger(), Settings().home
    announced: dict[str, list[str]] = {}
    troubles: dict[str, ClozelineError] = {}
    for task in tasks:
        try:
            changed, payload = announce_changes(inbox_of(task_location(task, home)))
        except ClozelineError as error:
            troubles[task] = error
            continue
        if changed:
            announced[task] = changed
            logger.info("%s: %d files are new or changed, %d rows to label now", task, len(changed), payload["rows"])
    if troubles:
        told = "\n".join(f"{task}: {error}" for task, error in troubles.items())
        wrong = all(isinstance(error, InputError) for error in troubles.values())
        raise InputError(told) if wrong else ClozelineError(told)
    return announced
