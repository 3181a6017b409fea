"""`clozeline store ls | du | gc`: what lies in the artifact store, and what of it may go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flows.cli_console import AsJson, human_bytes, out, print_json, say
from pipeline.housekeeping import Collection, collect, disk_use, list_artifacts, plan_gc
from pipeline.inventory import Stored
from pipeline.locations import masked
from pipeline.settings import Settings
from pipeline.store import Store, open_store

app = typer.Typer(
    help="Look at the artifact store (CLOZELINE_STORE), and clear it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _opened() -> tuple[Store, str]:
    """The store in force, and what to call it."""
    location = Settings().store_location
    return open_store(location), masked(location)


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


@app.command()
def ls(as_json: AsJson = False) -> None:
    """List every artifact, oldest first."""
    store, name = _opened()
    artifacts = list_artifacts(store)
    if as_json:
        print_json([vars(stored) for stored in artifacts])
        return
    # Without a frame a row takes 80 columns: keys stay whole, each in one line.
    table = Table(title="artifacts", title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column, width in (("stage", 8), ("key", 32), ("size", 8), ("files", 5), ("created (UTC)", 16), ("in use", 6)):
        table.add_column(column, no_wrap=True, min_width=width)
    for stored in artifacts:
        used = "yes" if stored.in_use else ""
        size, when = human_bytes(stored.bytes), _when(stored.created)
        table.add_row(escape(stored.stage), stored.key, size, f"{stored.files:,}", when, used)
    out.print(table)
    total = human_bytes(sum(stored.bytes for stored in artifacts))
    say(f"{len(artifacts):,} artifacts, {total}: {escape(name)}")


@app.command()
def du(as_json: AsJson = False) -> None:
    """Tell how much space each stage's artifacts take."""
    store, name = _opened()
    sizes = disk_use(store)
    if as_json:
        print_json({"stages": sizes, "bytes": sum(sizes.values())})
        return
    table = Table("stage", "size", title="disk use", title_justify="left")
    for stage, size in sizes.items():
        table.add_row(escape(stage), human_bytes(size))
    out.print(table)
    say(f"{human_bytes(sum(sizes.values()))} in all: {escape(name)}")


@app.command()
def gc(
    keep: Annotated[
        int,
        typer.Option(
            "--keep", min=0, help="How many versions of each release keep what they were made of; held ones do anyway."
        ),
    ] = 3,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, only tell what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove artifacts that nothing needs; a dry run unless --yes is given.

    What stays: what the last versions of each release, and those that are held, were made of, what a run or stage
    uses now, and what a run that did not finish within the last week had done. Releases themselves are never touched,
    and what was removed is computed again when it is wanted.
    """
    store, name = _opened()
    found = collect(store, keep) if yes else plan_gc(store, keep)
    if as_json:
        print_json(
            {
                "removed": yes,
                "bytes": found.bytes,
                "goes": [vars(stored) for stored in found.goes],
                "stays": [{**vars(stored), "why": why} for stored, why in found.stays],
                "litter": [vars(litter) for litter in found.litter],
            }
        )
        return
    if found.goes or found.stays or found.litter:
        _show(found)
    freed = human_bytes(found.bytes)
    if yes:
        say(f"removed {len(found.goes):,} artifacts, {freed} freed: {escape(name)}")
    else:
        say(f"dry run: {len(found.goes):,} artifacts would go, {freed}: {escape(name)}; --yes removes them")


def _show(found: Collection) -> None:
    table = Table(title="collection", title_justify="left")
    for column in ("what", "number", "size", "why"):
        table.add_column(column, no_wrap=column == "what", overflow="fold")

    def add(what: str, why: str, sizes: Iterable[int]) -> None:
        sizes = list(sizes)
        table.add_row(escape(what), f"{len(sizes):,}", human_bytes(sum(sizes)), escape(why))

    for stage in Counter(stored.stage for stored in found.goes):
        add(f"goes: {stage}", "nothing needs it", (stored.bytes for stored in found.goes if stored.stage == stage))
    for why in Counter(litter.why for litter in found.litter):
        add("goes: litter", why, (litter.bytes for litter in found.litter if litter.why == why))
    groups: dict[str, list[Stored]] = {}
    for stored, why in found.stays:
        groups.setdefault(why, []).append(stored)
    for why, kept in groups.items():
        add("stays", why, (stored.bytes for stored in kept))
    out.print(table)
