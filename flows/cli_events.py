"""`clozeline notify` and `clozeline watch`: they tell Prefect's server of new data."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.markup import escape

from flows.api import server_address
from flows.cli_console import AsJson, TaskFile, err, print_json, say, warn
from flows.events import DATA_LANDED, announce, announce_changes, inbox_of, task_location
from pipeline.errors import ClozelineError, InputError
from pipeline.inbox import Inbox
from pipeline.task import Task


def notify(
    task: TaskFile,
    no_counts: Annotated[
        bool, typer.Option("--no-counts", help="Tell the task alone; no file is opened to count rows.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell Prefect's server of new data, so that label/on-new-data runs.

    The task file is checked first. Done means that the server has taken the event.
    """
    loaded = Task.load(task)
    location = task_location(task)
    payload = announce(loaded, location, counted=not no_counts)
    if as_json:
        print_json({"event": DATA_LANDED, "payload": payload})
    else:
        say(f"told the server: {_what(payload)} ({DATA_LANDED}, {escape(location)})")


def watch(
    tasks: Annotated[list[str], typer.Argument(help="The task files: paths or URLs.", metavar="TASK...")],
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks.")] = 30.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch the files of tasks and notify when data has landed.

    A file is announced when two looks in a row found it the same, so that one that is still being written is not;
    with --once the look before is that of the command before. What was announced is remembered below
    CLOZELINE_HOME; at the first time, all files are new. A broken task or a server that is away is told and tried
    again at the next look; with --once it decides the exit code.
    """
    server_address()
    inboxes = [inbox_of(task_location(task)) for task in dict.fromkeys(tasks)]
    told: dict[str, str] = {}
    while True:
        troubles = [error for inbox in inboxes if (error := _look(inbox, told, as_json))]
        if once:
            if troubles:
                wrong = all(isinstance(error, InputError) for error in troubles)
                raise typer.Exit(2 if wrong else 1)
            return
        time.sleep(every)


def _look(inbox: Inbox, told: dict[str, str], as_json: bool) -> ClozelineError | None:
    """Look once at a task; a trouble is told when it is another than at the look before."""
    try:
        changed, payload = announce_changes(inbox)
    except ClozelineError as error:
        if told.get(inbox.location) != str(error):
            warn(f"{inbox.location}: {error}", err)
        told[inbox.location] = str(error)
        return error
    if told.pop(inbox.location, None):
        err.print(f"{escape(inbox.location)}: well again", highlight=False, soft_wrap=True)
    if changed and as_json:
        print_json({"event": DATA_LANDED, "payload": payload, "changed": changed})
    elif changed:
        names = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        say(f"{time.strftime('%H:%M:%S')} told the server: {_what(payload)}; new or changed: {escape(names)}")
    return None


def _what(payload: dict[str, Any]) -> str:
    """The payload's counts in words."""
    return f"{payload['rows']:,} rows in {payload['files']:,} files" if "rows" in payload else "new data"
