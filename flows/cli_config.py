"""`clozeline config`."""

from __future__ import annotations

import difflib
import os
from typing import Any, get_args

from pydantic_core import PydanticUndefined
from rich.markup import escape
from rich.table import Table

from flows.cli_console import AsJson, err, out, print_json, say, warn
from pipeline.locations import masked
from pipeline.settings import Settings

_PREFIX = str(Settings.model_config["env_prefix"])
_OF_THE_CLUSTER = {f"{_PREFIX}{name}" for name in ("PORT", "SERVER_HOST", "DATABASE_URL", "SILENCE")}


def _described(settings: Settings) -> list[dict[str, Any]]:
    """Every setting: its variable, value, default, choices and meaning."""
    rows = []
    for name, field in Settings.model_fields.items():
        value, default = getattr(settings, name), field.default
        rows.append(
            {
                "variable": f"{_PREFIX}{name.upper()}",
                "value": _plain(value),
                "default": None if default is PydanticUndefined else _plain(default),
                "given": name in settings.model_fields_set,
                "choices": [choice for choice in get_args(field.annotation) if isinstance(choice, str)],
                "description": field.description,
            }
        )
    return rows


def _plain(value: Any) -> Any:
    """A value as JSON, without credentials."""
    return value if value is None or isinstance(value, int | float) else masked(str(value))


def _server() -> dict[str, str | None]:
    """The Prefect API that commands talk to, and where that is said."""
    from prefect.settings import PREFECT_API_URL

    address = PREFECT_API_URL.value()
    if not address:
        return {"PREFECT_API_URL": None, "from": None}
    told = "the environment" if os.environ.get("PREFECT_API_URL") else "Prefect's profile or configuration file"
    return {"PREFECT_API_URL": masked(address), "from": told}


def config(as_json: AsJson = False) -> None:
    """List the settings and the Prefect server in force.

    Settings are environment variables. None of them changes a byte of a result: they say where and by whom work
    is done. Credentials in URLs are not shown.
    """
    settings = Settings()
    rows, server = _described(settings), _server()
    if as_json:
        derived = {"store": masked(settings.store_location), "cache": str(settings.cache_path)}
        print_json({"settings": rows, "in_force": derived, "prefect": server})
        return
    for variable in sorted(name for name in os.environ if name.startswith(_PREFIX)):
        if variable not in {row["variable"] for row in rows} | _OF_THE_CLUSTER:
            [near] = difflib.get_close_matches(variable, [row["variable"] for row in rows], n=1, cutoff=0.0)
            warn(f"{variable} is no setting; the nearest is {near}", err)
    table = Table(title="settings", title_justify="left")
    # A name that is cut, or goes on in the next line, can't be looked for.
    table.add_column("variable", no_wrap=True, min_width=max(len(row["variable"]) for row in rows))
    for name in ("value", "default", "meaning"):
        table.add_column(name, overflow="fold")
    for row in rows:
        meaning = row["description"] + (f" ({', '.join(row['choices'])})" if row["choices"] else "")
        value = "-" if row["value"] is None else escape(str(row["value"]))
        default = "-" if row["default"] is None else escape(str(row["default"]))
        table.add_row(row["variable"], f"[bold]{value}[/]" if row["given"] else value, default, escape(meaning))
    out.print(table)
    say(f"store: {escape(masked(settings.store_location))}")
    say(f"cache: {escape(str(settings.cache_path))}")
    if server["PREFECT_API_URL"]:
        say(f"Prefect server: {escape(server['PREFECT_API_URL'])} (from {server['from']})")
    else:
        say("Prefect server: a temporary one for each run (PREFECT_API_URL is not set)")
