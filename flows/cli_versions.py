"""`clozeline versions | promote | rollback | forget`: the versions under a release path."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flows.cli_console import AsJson, out, print_json, say
from pipeline.forgetting import Forgetting, plan_forgetting
from pipeline.forgetting import forget as forget_rows
from pipeline.locations import given
from pipeline.settings import Settings
from pipeline.store import open_store
from pipeline.versions import list_versions
from pipeline.versions import promote as promote_version
from pipeline.versions import rollback as roll_back

ReleasePath = Annotated[
    str, typer.Argument(metavar="RELEASE", help="The release: a directory or a URL (what holds versions/ and LATEST).")
]


def versions(release: ReleasePath, as_json: AsJson = False) -> None:
    """List the versions of a release: which one is in force, which are held, and why."""
    found = list_versions(given(release))
    if as_json:
        print_json([vars(version) for version in found])
        return
    table = Table("version", "published (UTC)", "rows", "state", title="versions", title_justify="left")
    for version in found:
        when = f"{datetime.fromtimestamp(version.created, UTC):%Y-%m-%d %H:%M:%S}" if version.created else "-"
        state = version.state + (f": {'; '.join(version.reasons)}" if version.reasons else "")
        table.add_row(version.name, when, f"{sum(version.rows.values()):,}", escape(state))
    out.print(table)


def promote(
    release: ReleasePath,
    version: Annotated[
        str | None, typer.Argument(help="Its name or number; by default the newest that is held.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a version in force: LATEST names it from then on. By default the newest that is held.

    A version is held where it looks worse than the one in force (release.gate in the task file), and after a
    rollback.
    """
    name = promote_version(given(release), version)
    if as_json:
        print_json({"in_force": name})
    else:
        say(f"in force: {name}")


def rollback(
    release: ReleasePath,
    version: Annotated[
        str | None, typer.Argument(help="Its name or number; by default the one before that in force.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put an earlier version in force, by default the one before; held ones are passed over.

    The version that was in force is held from then on, so that an unchanged run does not bring it back;
    `clozeline promote` does.
    """
    left, name = roll_back(given(release), version)
    if as_json:
        print_json({"in_force": name, "held": left})
    else:
        say(f"in force: {name}; held: {left}")


def forget(
    row_ids: Annotated[list[str], typer.Argument(metavar="ROW_ID...", help="Rows, by the column row_id.")],
    release: Annotated[str, typer.Option("--release", help="The release: a directory or a URL.", metavar="RELEASE")],
    store: Annotated[
        str | None, typer.Option("--store", help="The artifact store; by default CLOZELINE_STORE.", metavar="STORE")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without this, only tell what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove rows for good: from every version, the store and this machine's copies; a dry run unless --yes is given.

    Every row with the same text goes. Later runs leave the texts out, and refuse labelled and test rows that hold
    them. Your own files are yours to correct (the command names them), and models that were fitted before may have
    seen the text.
    """
    location = Settings().store_location if store is None else given(store)
    work = forget_rows if yes else plan_forgetting
    found = work(given(release), list(dict.fromkeys(row_ids)), open_store(location))
    if as_json:
        print_json(_as_json(found, yes))
    else:
        _show(found, yes)


def _as_json(found: Forgetting, removed: bool) -> dict[str, Any]:
    return {
        "removed": removed,
        "contents": found.contents,
        "versions": found.versions,
        "artifacts": [vars(stored) for stored in found.artifacts],
        "sources": found.sources,
    }


def _show(found: Forgetting, removed: bool) -> None:
    table = Table("where", "what", title="rows to forget", title_justify="left")
    for name, rows in found.versions.items():
        table.add_row(f"version {name}", f"{rows:,} rows")
    for stored in found.artifacts:
        table.add_row(f"store: {escape(stored.stage)}/{stored.key}", "built again when it is needed")
    out.print(table)
    for source in found.sources:
        say(f"yours to remove it from: {escape(source)}")
    if not found.sources:
        say("the store knows no source file that holds them; look in those that your task names")
    say("models that were fitted before may have seen the text; run the task again for one that has not")
    if removed:
        say(f"forgotten: {len(found.contents):,} rows")
    else:
        say(f"dry run: {len(found.contents):,} rows would be forgotten; --yes forgets them")
