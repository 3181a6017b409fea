"""Clozeline: from a handful of labelled texts to a labelled dataset, the PET way.

>>> from pipeline import Task
"""

from pipeline.errors import ClozelineError, InputError
from pipeline.task import Task

__all__ = ["ClozelineError", "InputError", "Task"]
