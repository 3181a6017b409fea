"""What can go wrong, as types.

`InputError` is the user's to fix (exit code 2) and says what, where and how; `ClozelineError` is the rest
(exit code 1).
"""

from __future__ import annotations


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


def _rebuild_input_error(problem: str, where: str | None, fix: str | None) -> InputError:
    return InputError(problem, where=where, fix=fix)


class StageFailed(ClozelineError):
    """A stage ended with an error; the message holds the end of its output."""


class StageLost(ClozelineError):
    """The process that ran a stage went away (killed, out of memory): the stage may go better next time."""


class StoreDamaged(ClozelineError):
    """An artifact in the store does not match its manifest."""
