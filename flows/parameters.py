"""How a flow's parameters are shown in the form of the Prefect UI."""

from __future__ import annotations

from typing import Any

from pydantic import Field


def shown(title: str, description: str, **extra: Any) -> Any:
    """Title, description and more for a parameter's form field.

    Prefect makes the title of each field anew from the parameter's name, and takes its description from the
    docstring; what stands in ``json_schema_extra`` is laid over both.
    """
    return Field(json_schema_extra={"title": title, "description": description, **extra})
