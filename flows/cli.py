"""The `clozeline` command.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flows import cli_store
from flows.cli_adapt import adapt
from flows.cli_config import config
from flows.cli_console import (
    AsJson,
    OutDir,
    Overrides,
    ProgressBars,
    TaskFile,
    err,
    on_this_machine,
    out,
    percent,
    print_json,
    say,
    show_summary,
    warn,
)
from flows.cli_events import notify, watch
from flows.cli_versions import forget, promote, rollback, versions
from flows.events import task_location
from pipeline.errors import ClozelineError, InputError, writing
from pipeline.locations import is_url
from pipeline.plan import human_seconds
from pipeline.settings import EngineName, Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_STOPPED = 130  # what typer makes of Ctrl-C
Engine = Annotated[
    EngineName | None,
    typer.Option("--engine", help="Where stages that run a model are executed; by default what CLOZELINE_ENGINE says."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"clozeline {version('clozeline')}")
        raise typer.Exit


@app.callback()
def clozeline(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """From a handful of labelled texts and a heap of unlabelled Parquet to a labelled dataset."""


@contextmanager
def _prefect_server() -> Iterator[None]:
    """The configured server, or a temporary one that can't outlive this process."""
    # Prefect's own lines would tear the progress bars; whoever wants them sets the level.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

    from flows.api import ask_server
    from flows.server import temporary_server

    if PREFECT_API_URL.value():
        ask_server()  # one that is away would be told by Prefect, after some time, in a traceback
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
    engine: Engine = None,
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
    from pipeline.publishing import release_path
    from pipeline.task import Task

    # Before anything is started: a wrong task is told within a second.
    loaded = Task.load(task, overrides)
    release_path(loaded, out_dir)
    for warning in check_task(loaded):
        warn(warning, err)
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
            summary = label(
                task=task_location(task), out=out_dir, overrides=list(overrides), engine=engine or Settings().engine
            )
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if as_json:
        print_json(dict(sorted(summary.items())))
    else:
        show_summary(summary)


def _dry_run(task: str, overrides: list[str], out_dir: str | None, as_json: bool) -> None:
    from pipeline.checks import check_task
    from pipeline.plan import plan_run
    from pipeline.store import open_store
    from pipeline.task import Task

    loaded = Task.load(task, overrides)
    warnings = check_task(loaded)
    plan = plan_run(loaded, out_dir)
    missing = {call.key for call in plan.to_build(open_store(Settings().store_location))}
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
        print_json({"stages": rows, "seconds": round(total, 1), "warnings": warnings})
        return
    for warning in warnings:
        warn(warning)
    table = Table("stage", "state", "estimate", title=f"{loaded.name}: {plan.rows:,} rows", title_justify="left")
    for row in rows:
        cost = "" if row["cached"] else human_seconds(float(str(row["seconds"])))
        table.add_row(escape(str(row["stage"])), "cached" if row["cached"] else "to do", cost)
    out.print(table)
    device = f"{plan.profile['device']}, {plan.profile['dtype']}"
    say(f"{len(missing)} of {len(rows)} stages to do, about {human_seconds(total)} ({device})")


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count:,} {noun}{'' if count == 1 else plural}"


@app.command()
def check(task: TaskFile, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Tell what is wrong with a task, its files, labels and words before anything runs, and the estimated work."""
    from pipeline.checks import check_task
    from pipeline.plan import build_plan
    from pipeline.task import Task

    loaded = Task.load(task, overrides)
    warnings = check_task(loaded)
    plan = build_plan(loaded, loaded.base())
    estimate: dict[str, Any] = {
        "rows": plan.rows,
        "tokens": round(plan.tokens),
        "annotators": len(list(loaded.members())),
        "fits": sum(1 + (call.spec["folds"] if "labelled" in call.inputs else 0) for call in plan.find("fit")),
        "model_passes": len(plan.find("annotate")) + len(plan.find("label")),
        "teraflops": round(sum(call.flops for call in plan.calls) / 1e12, 3),
        "device": dict(plan.profile),
        "device_hours": round(sum(plan.seconds(call) for call in plan.calls if call.on_device) / 3600, 4),
        "warnings": warnings,
    }
    if as_json:
        print_json(estimate)
        return
    for warning in warnings:
        warn(warning)
    say(f"{escape(loaded.name)} is fine.")
    generations = f" in {1 + loaded.ipet.generations} generations" if loaded.ipet.generations else ""
    say(
        f"{_counted(plan.rows, 'row')} to label, about {round(plan.tokens):,} tokens; "
        f"{_counted(estimate['annotators'], 'annotator')}{generations} "
        f"({_counted(estimate['fits'], 'fit')} with cross-validation), "
        f"{_counted(estimate['model_passes'], 'scoring pass', 'es')};\n"
        f"about {estimate['teraflops']} TFLOP, {human_seconds(estimate['device_hours'] * 3600)} on "
        f"{plan.profile['device']} in {plan.profile['dtype']}."
    )


@app.command()
def predict(
    student: Annotated[
        str, typer.Argument(metavar="RELEASE_OR_STUDENT", help="A release (a path or a URL), a version or its model.")
    ],
    source: Annotated[str, typer.Argument(metavar="IN.parquet", help="A path or a URL.")],
    target: Annotated[str, typer.Argument(metavar="OUT.parquet")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Label a Parquet file with a released student; rows without text get no label."""
    import transformers

    from pipeline.predict import predict_file

    written = on_this_machine(target)
    if written.exists() and not force:
        raise InputError("the file is there already", where=target, fix="choose another OUT.parquet, or --force")

    transformers.logging.disable_progress_bar()  # its bar for loading weights would stand before ours
    with Progress(TextColumn("predict"), BarColumn(), MofNCompleteColumn(), console=err, transient=True) as progress:
        bar = progress.add_task("predict", total=None)
        rows = predict_file(
            student, source, written, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    if as_json:
        print_json({"rows": rows, "path": target})
    else:
        say(f"{rows:,} rows labelled: {escape(target)}")


@app.command()
def init(
    file: Annotated[str, typer.Argument(metavar="FILE.parquet", help="Labelled rows, or rows to label.")],
    unlabelled: Annotated[
        str | None, typer.Option(help="The Parquet to label, as the task file shall have it.")
    ] = None,
    out_file: Annotated[str, typer.Option("--out", help="Where to write.", metavar="TASK")] = "task.yaml",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented task file from what a Parquet file shows."""
    from pipeline.locations import write_atomically
    from pipeline.starter import starter_task

    target = on_this_machine(out_file)
    if target.exists() and not force:
        raise InputError("the file is there already", where=str(target), fix="choose another --out, or --force")
    if is_url(file):
        raise InputError("a draft is made from a file on this machine", where=file, fix="fetch it, or a part of it")
    text = starter_task(Path(file), unlabelled, target.absolute().parent)
    with writing("the task file", target, "choose another --out"):
        write_atomically(target, text)
    say(f"wrote {escape(str(target))}; next: clozeline check {escape(str(target))}")


@app.command()
def preview(task: TaskFile, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Show the patterns on real rows: rendered text, token counts, how many texts are cut."""
    from pipeline.preview import excerpt, preview_task, printable
    from pipeline.task import Task

    shown = preview_task(Task.load(task, overrides))
    if as_json:
        patterns = [vars(found) for found in shown.patterns]
        print_json({"rows": shown.rows, "blank": shown.blank, "patterns": patterns})
        return
    if not shown.rows:
        blank = f"the first {shown.blank:,} rows of {shown.file} have no text" if shown.blank else ""
        warn(f"{blank or f'{shown.file} has no row'}: there is nothing to show the patterns on")
    for found in shown.patterns:
        say(f"[bold]{escape(found.name)}[/]  {escape(printable(found.pattern))}")
        for example in found.examples:
            out.print(Text(f"  {excerpt(example)}"), soft_wrap=True)  # as it stands: ":bug:" stays ":bug:"
        words = ", ".join(w if len(t) == 1 else f"{w} ({' '.join(t)})" for w, t in found.words.items())
        say(f"  [dim]words:[/] {escape(printable(words))}")
        if shown.rows:
            say(
                f"  [dim]tokens:[/] {found.mean_tokens:.1f} on average, {found.max_tokens} at most; "
                f"{percent(found.shortened)} of {shown.rows:,} rows are cut"
            )


app.add_typer(cli_store.app, name="store")
app.command()(adapt)
app.command()(notify)
app.command()(watch)
app.command()(config)
app.command()(versions)
app.command()(promote)
app.command()(rollback)
app.command()(forget)


def main() -> None:
    """Run the command and turn errors into exit codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone is no reason to stop
    try:
        if "--help" not in sys.argv:  # which is for those whose settings are wrong, too
            Settings()
        app(standalone_mode=True)
    except InputError as error:
        err.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True, emoji=False)
        sys.exit(2)
    except SystemExit as end:
        if end.code != _STOPPED:
            raise
        err.print("stopped; the same command goes on from here", highlight=False)
        # Prefect's threads may still wait for answers about a run that is over.
        sys.stderr.flush()
        os._exit(_STOPPED)
    except ClozelineError as error:
        err.print(f"[red]failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True, emoji=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
