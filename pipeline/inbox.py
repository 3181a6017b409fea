"""What has landed among a task's files since it was last announced.

A look compares the files with the look before. A file is announced when two looks in a row have found it the same,
so that one that is still being written is not; the announcement is acknowledged after it is out, so that a crash in
between repeats it and never loses it.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import InputError
from pipeline.locations import AT_ONCE, local_path, write_atomically
from pipeline.store import key_of
from pipeline.task import Task
from pipeline.transfer import look_at

Mark = tuple[int, int | str]


def snapshot(task: Task) -> dict[str, Mark]:
    """The unlabelled and labelled files as they are now.

    Returns:
        Each file's size in bytes and modification time in nanoseconds, by its absolute path; behind a URL its size
        and what the storage says of its content, by its URL. No file is read or fetched.

    Raises:
        InputError: a path or glob of the task matches nothing, or a file can't be looked at.
        StorageTrouble: the storage did not answer.
    """
    files = task.matched_locations()
    if task.inputs.labelled is not None:
        files.append(task.locate(task.inputs.labelled))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(marked for marked in pool.map(_mark, files) if marked)


def _mark(location: str) -> tuple[str, Mark] | None:
    """A file's name and mark; None where it went away since it was listed, which the next look tells."""
    here = local_path(location)
    if here is None:
        entry = look_at(location)
        return location, (entry.bytes, entry.validator)
    try:
        status = here.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"can't look at a file: {error}", where=str(here)) from error
    return str(here.absolute()), (status.st_size, status.st_mtime_ns)


class Inbox:
    """Watches the files of one task.

    Args:
        location: the task file, an absolute path or a URL.
        state_dir: where looks and announcements are remembered, so that any process can make the next look.
    """

    def __init__(self, location: str, state_dir: Path) -> None:
        self.location = location
        file = PurePosixPath(location)
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", file.stem if file.stem != "task" else file.parent.name)
        self._state = state_dir / f"{name}-{key_of(location)[:12]}.json"
        self._looked: dict[str, Mark] = {}
        self._acknowledged: dict[str, Mark] = {}
        self._changed: list[str] = []

    def changes(self) -> list[str]:
        """Look once.

        Returns:
            The files that are new, or differ from what was last acknowledged, and are as the look before found
            them; sorted.

        Raises:
            InputError: the task can't be read, its files can't be found, or the look can't be remembered.
        """
        now = snapshot(Task.load(self.location))
        before, self._acknowledged = self._remembered()
        self._changed = sorted(
            file for file, mark in now.items() if mark == before.get(file) and mark != self._acknowledged.get(file)
        )
        self._looked = now
        self._remember()
        return list(self._changed)

    def acknowledge(self) -> None:
        """Remember that what the last look returned has been announced; files that are gone are forgotten."""
        told = {**self._acknowledged, **{file: self._looked[file] for file in self._changed}}
        self._acknowledged = {file: told[file] for file in self._looked if file in told}
        self._changed = []
        self._remember()

    def _remembered(self) -> tuple[dict[str, Mark], dict[str, Mark]]:
        """The last look and what is acknowledged.

        An unreadable state counts as none: an announcement may be repeated, but not lost.
        """
        try:
            state: dict[str, Any] = json.loads(self._state.read_text(encoding="utf-8"))
            looked, acknowledged = (
                {str(file): (int(size), known) for file, (size, known) in state[part].items()}
                for part in ("looked", "acknowledged")
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}, {}
        return looked, acknowledged

    def _remember(self) -> None:
        state = {"task": self.location, "looked": self._looked, "acknowledged": self._acknowledged}
        try:
            self._state.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._state, json.dumps(state, indent=1, sort_keys=True))
        except OSError as error:
            raise InputError(
                f"can't remember the look: {error}",
                where=str(self._state.parent),
                fix="set CLOZELINE_HOME to a directory that can be written",
            ) from error
