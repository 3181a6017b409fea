"""What can go wrong, as types.

`InputError` is the user's to fix (exit code 2) and says what, where and how; `ClozelineError` is the rest
(exit code 1).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


class ClozelineError(Exception):
    """Something failed that the user's input did not cause."""


class InputError(ClozelineError):
    """The user's input is wrong.

    Args:
        problem: what is wrong, in one sentence.
        where: the file, and the row, column or key in it.
        fix: what to do about it.
    """

    def __init__(self, problem: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.problem, self.where, self.fix = problem, where, fix
        super().__init__(
            "\n".join(part for part in (problem, where and f"  in: {where}", fix and f"  fix: {fix}") if part)
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments do not pickle by themselves, and Prefect moves them about.
        return (_rebuild_input_error, (self.problem, self.where, self.fix))


def _no_room(error: Exception) -> bool:
    """Whether an error says that a disk is full; by its text, since Rust's and Arrow's have no number."""
    return any(sign in str(error) for sign in _NO_ROOM)


@contextmanager
def room(where: str | Path, fix: str) -> Iterator[None]:
    """Tell a full disk, from whatever library, as the user's to mend.

    Args:
        where: the directory that a block writes below.
        fix: what may help beside making room.

    Raises:
        InputError: there is no room left.
    """
    try:
        yield
    except ClozelineError:
        raise
    except Exception as error:
        if not _no_room(error):
            raise
        raise InputError("the disk is full", where=str(where), fix=f"free some space, or {fix}") from error


@contextmanager
def writing(what: str, where: str | Path, fix: str) -> Iterator[None]:
    """Tell whatever keeps a block from writing as the user's to mend; it must do nothing with files but write them.

    Raises:
        InputError: it can't write.
    """
    with room(where, fix):
        try:
            yield
        except OSError as error:
            if _no_room(error):
                raise
            raise InputError(f"can't write {what}: {error}", where=str(where), fix=fix) from error


@contextmanager
def loading(what: str, where: str | Path, fix: str) -> Iterator[None]:
    """Tell files that a library can't make sense of as the user's to mend: it raises what its authors did not expect.

    Args:
        what: what is loaded, for people.
        where: its directory.
        fix: what may help.

    Raises:
        InputError: the files are not what they should be.
    """
    try:
        yield
    except (ClozelineError, MemoryError):
        raise
    except RuntimeError as error:
        if "mismatch" not in str(error):  # of sizes; what else torch says so is about memory and devices
            raise
        raise InputError(f"can't load {what}: {_brief(error)}", where=str(where), fix=fix) from error
    except Exception as error:
        raise InputError(f"can't load {what}: {_brief(error)}", where=str(where), fix=fix) from error


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _rebuild_input_error(problem: str, where: str | None, fix: str | None) -> InputError:
    return InputError(problem, where=where, fix=fix)


class StageFailed(ClozelineError):
    """A stage ended with an error; the message holds the end of its output."""


class StageLost(ClozelineError):
    """The process that ran a stage went away (killed, out of memory): the stage may go better next time."""


class OutOfMemory(StageLost):
    """A stage wanted more memory than there is: it may fit with half batches."""


class StageHung(StageLost):
    """A stage made no progress for so long that its process was killed."""


class RunStopped(ClozelineError):
    """The run was stopped from outside while a stage was running."""


class StoreDamaged(ClozelineError):
    """An artifact in the store does not match its manifest."""


def rebuilt(kind: str, message: str) -> ClozelineError:
    """An error that another process, or another machine, reported by its type's name and its text."""
    if kind == InputError.__name__:
        return InputError(message)
    known = {found.__name__: found for found in _kinds(ClozelineError)}
    return known.get(kind, StageFailed)(message)


def _kinds(kind: type[ClozelineError]) -> list[type[ClozelineError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _kinds(child))]


class StorageTrouble(ClozelineError):
    """A storage behind a URL did not answer as it should (time-outs, 5xx, broken connections): try again later."""


class LeaseLost(StorageTrouble):
    """A lease was taken over by another process, since it had not been renewed in time."""


class VersionHeld(ClozelineError):
    """A version was written and looks worse than the one in force, which stays until somebody promotes it."""
