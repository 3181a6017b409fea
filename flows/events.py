"""The event that tells Prefect's server of new data, on which the deployment ``label/on-new-data`` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.api import emit_event
from pipeline.inbox import Inbox
from pipeline.locations import is_url
from pipeline.settings import Settings
from pipeline.tables import open_parquet
from pipeline.task import Task

DATA_LANDED = "clozeline.data.landed"


def task_location(task: str, start: Path = Path()) -> str:
    """A task file as any process finds it: a URL as it is, a path from the root, relative ones from ``start``."""
    if is_url(task):
        return task
    path = (start / task).absolute()
    return str(path.resolve() if ".." in path.parts else path)  # links stay: other machines may resolve them otherwise


def announce(task: Task, location: str, *, counted: bool = True) -> dict[str, Any]:
    """Tell the server that a task has new data; returns when the server has taken the event.

    Args:
        task: the task.
        location: its file (`task_location`).
        counted: whether to tell how many unlabelled files and rows there are, for which the files are opened.

    Returns:
        The event's payload: ``task`` and, where counted, ``files`` and ``rows``.

    Raises:
        InputError: an unlabelled file can't be found or read, or the server is not configured or refuses the event.
        ClozelineError: the server does not answer.
    """
    payload: dict[str, Any] = {"task": location}
    if counted:
        files = task.unlabelled_files()
        payload |= {"files": len(files), "rows": sum(open_parquet(file).metadata.num_rows for file in files)}
    resource = {"prefect.resource.id": f"clozeline.task.{task.name}", "prefect.resource.name": task.name}
    emit_event(DATA_LANDED, resource, payload)
    return payload


def inbox_of(location: str) -> Inbox:
    """The inbox of a task file (`task_location`), with its state below CLOZELINE_HOME."""
    return Inbox(location, Settings().home.absolute() / ".clozeline" / "inbox")


def announce_changes(inbox: Inbox) -> tuple[list[str], dict[str, Any]]:
    """Look once at a task's files and tell the server if there is something new.

    Returns:
        The new and changed files, none when there is nothing to tell, and the payload of the event.

    Raises:
        InputError: the task or a file of it is wrong, or the server is not configured or refuses the event.
        ClozelineError: the server does not answer.
    """
    changed = inbox.changes()
    if not changed:
        return [], {}
    payload = announce(Task.load(inbox.location), inbox.location)
    inbox.acknowledge()
    return changed, payload
