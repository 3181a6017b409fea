"""The `clozeline` command.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipeline.errors import ClozelineError, InputError
from pipeline.metrics import METHODS
from pipeline.plan import Call, Plan, human_seconds

app = typer.Typer(
    help="From a handful of labelled texts and a heap of unlabelled Parquet to a labelled dataset.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_STOPPED = 130  # what typer makes of Ctrl-C
out, err = Console(), Console(stderr=True)

TaskFile = Annotated[str, typer.Argument(help="The task file (YAML).", metavar="TASK")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", help="A setting that wins over the file's: dotted.key=value. Repeatable."),
]
OutDir = Annotated[str | None, typer.Option("--out", help="The release directory.", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


class ProgressBars:
    """One bar for each stage that runs."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, Any] = {}
        self._all: Any = None

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

    def finished(self, title: str) -> None:
        """Move the run's bar."""
        self._progress.advance(self._all)


@contextmanager
def _prefect_server() -> Iterator[None]:
    """The configured server, or a temporary one that can't outlive this process."""
    # Prefect's own lines would tear the progress bars; whoever wants them sets the level.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

    from flows.server import temporary_server

    if PREFECT_API_URL.value():
        yield
        return
    with (
        temporary_server() as address,
        temporary_settings({PREFECT_API_URL: address, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False}),
    ):
        yield


@app.command()
def run(
    task: TaskFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads it, nobody changes it
    out_dir: OutDir = None,
    as_json: AsJson = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show which stages are cached and what the rest will cost.")
    ] = False,
) -> None:
    """Label a dataset: fit, blend, distill, label, publish. What is cached is not done again."""
    if dry_run:
        _dry_run(task, overrides, out_dir, as_json)
        return
    from pipeline.checks import check_task
    from pipeline.task import Task

    check_task(Task.load(task, overrides))  # before anything is started: a wrong task is told within a second
    with _prefect_server():
        from flows import dispatch
        from flows.label import label
        from flows.observer import observing

        def stop(*_: Any) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            dispatch.stop_all()
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, stop)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=err, transient=True) as progress, observing(ProgressBars(progress)):
            summary = label(task=str(Path(task).absolute()), out=out_dir, overrides=list(overrides))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if as_json:
        print(json.dumps(summary, indent=1, sort_keys=True))
    else:
        _show_summary(summary)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _show_summary(summary: dict[str, Any]) -> None:
    for warning in summary["warnings"]:
        out.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    table = Table("split", "rows", title=f"{summary['name']}: rows", title_justify="left")
    for split, rows in summary["rows"].items():
        table.add_row(split, f"{rows:,}")
    out.print(table)
    total = max(sum(summary["label_counts"].values()), 1)
    table = Table("label", "rows", "share", title="labels given", title_justify="left")
    for name, count in sorted(summary["label_counts"].items(), key=lambda entry: -entry[1]):
        table.add_row(escape(name), f"{count:,}", _percent(count / total))
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
            table.add_row(name, _percent(found["accuracy"]), interval, _percent(found["macro_f1"]))
        out.print(table)
    table = Table("stage", "seconds", title="seconds a stage", title_justify="left")
    executed = {title.split()[0] for title in summary["executed"]}
    for stage, seconds in summary["seconds"].items():
        table.add_row(stage, f"{seconds:.1f}" if stage in executed else f"{seconds:.1f} [dim](cached)[/]")
    out.print(table)
    state = "new version" if summary["new"] else "unchanged"
    out.print(f"release ({state}): {escape(summary['release'])}", highlight=False, soft_wrap=True)


def _dry_run(task: str, overrides: list[str], out_dir: str | None, as_json: bool) -> None:
    from pipeline.checks import check_task
    from pipeline.plan import plan_run
    from pipeline.settings import Settings
    from pipeline.store import Store
    from pipeline.task import Task

    loaded = Task.load(task, overrides)
    warnings = check_task(loaded)
    plan = plan_run(loaded, out_dir)
    missing = {call.key for call in plan.to_build(Store(Settings().store_path))}
    rows = [
        {
            "stage": call.title,
            "cached": call.key not in missing,
            "seconds": round(plan.seconds(call), 1) if call.key in missing else 0.0,
        }
        for call in plan.calls
    ]
    total = sum(float(str(row["seconds"])) for row in rows)
    if as_json:
        print(json.dumps({"stages": rows, "seconds": round(total, 1), "warnings": warnings}, indent=1))
        return
    for warning in warnings:
        out.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    table = Table("stage", "state", "estimate", title=f"{loaded.name}: {plan.rows:,} rows", title_justify="left")
    for row in rows:
        cost = "" if row["cached"] else human_seconds(float(str(row["seconds"])))
        table.add_row(escape(str(row["stage"])), "cached" if row["cached"] else "to do", cost)
    out.print(table)
    device = f"{plan.profile['device']}, {plan.profile['dtype']}"
    out.print(
        f"{len(missing)} of {len(rows)} stages to do, about {human_seconds(total)} ({device})",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def check(task: TaskFile, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Tell every mistake in a task before any model runs, and the estimated work."""
    from pipeline.base_model import resolve_base_model
    from pipeline.checks import check_task
    from pipeline.plan import build_plan
    from pipeline.task import Task

    loaded = Task.load(task, overrides)
    warnings = check_task(loaded)
    plan = build_plan(loaded, resolve_base_model(loaded.base_model, loaded.root))
    estimate = {
        "rows": plan.rows,
        "tokens": round(plan.tokens),
        "annotators": len(plan.find("fit")),
        "fits": sum(1 + (call.spec["folds"] if "labelled" in call.inputs else 0) for call in plan.find("fit")),
        "model_passes": len(plan.find("annotate")) + len(plan.find("label")),
        "teraflops": round(sum(call.flops for call in plan.calls) / 1e12, 3),
        "device": dict(plan.profile),
        "device_hours": round(sum(plan.seconds(call) for call in plan.calls if call.on_device) / 3600, 4),
        "warnings": warnings,
    }
    if as_json:
        print(json.dumps(estimate, indent=1))
        return
    for warning in warnings:
        out.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    out.print(f"{escape(loaded.name)} is fine.", highlight=False, soft_wrap=True)
    out.print(
        f"{plan.rows:,} rows to label, about {round(plan.tokens):,} tokens; {estimate['annotators']} annotators "
        f"({estimate['fits']} fits with cross-validation), {estimate['model_passes']} scoring passes;\n"
        f"about {estimate['teraflops']} TFLOP, {human_seconds(estimate['device_hours'] * 3600)} on "
        f"{plan.profile['device']} in {plan.profile['dtype']}.",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def predict(
    student: Annotated[Path, typer.Argument(metavar="RELEASE_OR_STUDENT", help="A release, a version or its model.")],
    source: Annotated[Path, typer.Argument(metavar="IN.parquet")],
    target: Annotated[Path, typer.Argument(metavar="OUT.parquet")],
    as_json: AsJson = False,
) -> None:
    """Label a Parquet file with a released student."""
    import transformers

    from pipeline.predict import predict_file

    transformers.logging.disable_progress_bar()  # its bar for loading weights would stand before ours
    with Progress(TextColumn("predict"), BarColumn(), MofNCompleteColumn(), console=err, transient=True) as progress:
        bar = progress.add_task("predict", total=None)
        rows = predict_file(
            student, source, target, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    if as_json:
        print(json.dumps({"rows": rows, "path": str(target)}))
    else:
        out.print(f"{rows:,} rows labelled: {escape(str(target))}", highlight=False, soft_wrap=True)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE.parquet", help="Labelled rows, or rows to label.")],
    unlabelled: Annotated[
        str | None, typer.Option(help="The Parquet to label, as the task file shall have it.")
    ] = None,
    target: Annotated[Path, typer.Option("--out", help="Where to write.")] = Path("task.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented task file from what a Parquet file shows."""
    from pipeline.starter import starter_task
    from pipeline.store import write_atomically

    if target.exists() and not force:
        raise InputError("the file is there already", where=str(target), fix="choose another --out, or --force")
    write_atomically(target, starter_task(file, unlabelled, target.absolute().parent))
    out.print(
        f"wrote {escape(str(target))}; next: clozeline check {escape(str(target))}", highlight=False, soft_wrap=True
    )


@app.command()
def preview(task: TaskFile, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Show the patterns on real rows: rendered text, token counts, how many texts are cut."""
    from pipeline.preview import preview_task
    from pipeline.task import Task

    rows, previews = preview_task(Task.load(task, overrides))
    if as_json:
        print(json.dumps({"rows": rows, "patterns": [vars(found) for found in previews]}, indent=1))
        return
    for found in previews:
        out.print(f"[bold]{escape(found.name)}[/]  {escape(found.pattern)}", highlight=False, soft_wrap=True)
        for example in found.examples:
            out.print(f"  {escape(example)}", highlight=False, soft_wrap=True)
        words = ", ".join(w if len(t) == 1 else f"{w} ({' '.join(t)})" for w, t in found.words.items())
        out.print(f"  [dim]words:[/] {escape(words)}", highlight=False, soft_wrap=True)
        out.print(
            f"  [dim]tokens:[/] {found.mean_tokens:.1f} on average, {found.max_tokens} at most; "
            f"{_percent(found.shortened)} of {rows:,} rows are cut",
            highlight=False,
            soft_wrap=True,
        )


def main() -> None:
    """Run the command and turn errors into exit codes."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        err.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code != _STOPPED:
            raise
        err.print("stopped; the same command goes on from here", highlight=False)
        # Prefect's threads may still wait for answers about a run that is over.
        sys.stderr.flush()
        os._exit(_STOPPED)
    except ClozelineError as error:
        err.print(f"[red]failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
