"""What the commands share: the consoles, the arguments that several of them take, and how they say things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from pipeline.errors import InputError
from pipeline.locations import local_path
from pipeline.metrics import METHODS
from pipeline.plan import Call, Plan, human_seconds

out, err = Console(), Console(stderr=True)

TaskFile = Annotated[str, typer.Argument(help="The task file (YAML): a path or a URL.", metavar="TASK")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", help="A setting that wins over the file's: dotted.key=value. Repeatable."),
]
OutDir = Annotated[str | None, typer.Option("--out", help="The release directory.", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def on_this_machine(target: str) -> Path:
    """Where a command writes that writes to this machine alone.

    Raises:
        InputError: it is a URL.
    """
    here = local_path(target)
    if here is None:
        raise InputError("it is written to this machine alone", where=target, fix="give a path, and copy it then")
    return here


def say(markup: str) -> None:
    """Print lines as they are: neither wrapped nor coloured by guessing."""
    out.print(markup, highlight=False, soft_wrap=True, emoji=False)


def warn(text: str, console: Console = out) -> None:
    """Print a warning."""
    console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True, emoji=False)


def print_json(value: Any) -> None:
    """Print JSON on the standard output, whatever the terminal's width."""
    print(json.dumps(value, indent=1), flush=True)


def human_bytes(count: float) -> str:
    """A size for people.

    >>> human_bytes(12), human_bytes(34_500_000)
    ('12 B', '34.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def percent(value: float) -> str:
    """A share for people."""
    return f"{100 * value:.1f} %"


def show_summary(summary: dict[str, Any]) -> None:
    """Print what a run left: rows, labels, accuracies, seconds and the release."""
    for warning in summary["warnings"]:
        warn(warning)
    table = Table("split", "rows", title=f"{summary['name']}: rows", title_justify="left")
    for split, rows in summary["rows"].items():
        table.add_row(split, f"{rows:,}")
    out.print(table)
    total = max(sum(summary["label_counts"].values()), 1)
    table = Table("label", "rows", "share", title="labels given", title_justify="left")
    for name, count in sorted(summary["label_counts"].items(), key=lambda entry: -entry[1]):
        table.add_row(escape(name), f"{count:,}", percent(count / total))
    out.print(table)
    if summary["test"]:
        rows = next(found["rows"] for found in summary["test"].values() if found)
        table = Table(
            "method",
            "accuracy",
            "95 % interval",
            "macro-F1",
            title=f"on {rows:,} test rows",
            title_justify="left",
        )
        for name in METHODS:
            found = summary["test"][name]
            if found is None:
                table.add_row(name, "-", "-", "-")
                continue
            if name == "best annotator":
                name = f"best annotator ({summary['best_annotator']}, by cross-validation)"
            elif name == "oracle annotator":
                name = "oracle annotator (best on this file)"
            interval = f"{100 * found['accuracy_low']:.1f} to {100 * found['accuracy_high']:.1f} %"
            table.add_row(name, percent(found["accuracy"]), interval, percent(found["macro_f1"]))
        out.print(table)
    table = Table("stage", "seconds", title="seconds a stage", title_justify="left")
    executed = {title.split()[0] for title in summary["executed"]}
    for stage, seconds in summary["seconds"].items():
        table.add_row(stage, f"{seconds:.1f}" if stage in executed else f"{seconds:.1f} [dim](cached)[/]")
    out.print(table)
    state = "new version" if summary["new"] else "unchanged"
    say(f"release ({state}): {escape(summary['release'])}")


class ProgressBars:
    """One bar for each stage that runs."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, Any] = {}
        self._all: Any = None

    def waiting(self, text: str) -> None:
        """Leave a line: the run stands still, and why."""
        self._progress.console.print(f"[yellow]{escape(text)}[/]", highlight=False, soft_wrap=True)

    def planned(self, plan: Plan, to_build: list[Call]) -> None:
        """A bar for the whole run."""
        self._all = self._progress.add_task("all stages", total=len(plan.calls))

    def started(self, key: str, title: str) -> None:
        """A bar for the stage."""
        self._bars[key] = self._progress.add_task(title, total=None)

    def progressed(self, key: str, done: int, total: int) -> None:
        """Move the stage's bar."""
        self._progress.update(self._bars[key], completed=done, total=total)

    def built(self, key: str, title: str, seconds: float) -> None:
        """Take the stage's bar away and leave a line."""
        self._progress.remove_task(self._bars.pop(key))
        self._progress.console.print(f"[green]✓[/] {escape(title)} [dim]{human_seconds(seconds)}[/]", highlight=False)

    def lost(self, key: str) -> None:
        """Take the stage's bar away."""
        self._progress.remove_task(self._bars.pop(key))

    def finished(self, title: str) -> None:
        """Move the run's bar."""
        self._progress.advance(self._all)
