"""`clozeline adapt`: the stage of that name alone, for a look at its curve or for a base model to keep."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flows.cli_console import AsJson, Overrides, TaskFile, err, on_this_machine, out, percent, print_json, say, warn
from pipeline.errors import InputError, OutOfMemory, writing

if TYPE_CHECKING:
    from pipeline.worker import StageProcess


def adapt(
    task: TaskFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads it, nobody changes it
    target: Annotated[
        str | None, typer.Option("--out", help="Copy the adapted model there, for base_model to name.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Write the copy in fp16: half the size.")] = False,
    release: Annotated[
        str | None,
        typer.Option(help="The release directory, if `clozeline run` is given one: its transfer set is kept."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train the base model on the task's unlabelled texts (adapt.* in the task file), and stop there.

    What is cached is not done again, a killed run goes on from its last checkpoint, and `clozeline run` finds the
    result in the store. `clozeline store gc` keeps what releases were made of: copy what you want to keep.
    """
    from pipeline.checks import check_task
    from pipeline.plan import plan_run
    from pipeline.settings import Settings
    from pipeline.store import open_store
    from pipeline.task import Task
    from pipeline.worker import StageProcess

    loaded = Task.load(task, overrides)
    if not loaded.adapt.steps:
        raise InputError(
            "the task does not adapt its base model", where="adapt.steps", fix="set it, here by --set adapt.steps=1000"
        )
    if half and target is None:
        raise InputError("there is no copy to halve", where="--half", fix="give --out DIR")
    copy = None if target is None else on_this_machine(target)
    if copy is not None and copy.exists():
        raise InputError("there is something already", where=str(copy), fix="choose another --out")
    for warning in check_task(loaded):
        warn(warning, err)
    store = open_store(Settings().store_location)
    [stage] = plan_run(loaded, release).find("adapt")
    calls = list({call.key: call for call in _with_inputs(stage)}.values())
    built = store.find("adapt", stage.key) is None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        store.using([(call.stage, call.key) for call in calls], {"title": stage.title}),
        Progress(*columns, console=err, transient=True) as progress,
    ):
        with StageProcess() as process:
            for call in calls if built else ():
                bar = progress.add_task(call.title, total=None)
                _run(
                    process,
                    {**call.request(store), "on_device": call.on_device},
                    lambda done, total, bar=bar: progress.update(bar, completed=done, total=total),  # type: ignore[misc]
                )
        artifact = store.find("adapt", stage.key)
        assert artifact is not None
        if copy is not None:
            _copy(store.fetch(artifact).path / "model", copy, half)
    curve: list[dict[str, Any]] = artifact.meta["curve"]
    if as_json:
        print_json({"curve": curve, "best": artifact.meta["best"], "cached": not built, "path": target})
        return
    names = [name for name in ("step", "tokens", "loss", "accuracy", "cosine") if name in curve[0]]
    table = Table(*names, title="held-out texts, hidden tokens", title_justify="left")
    for i, point in enumerate(curve):
        cells = [percent(point[n]) if n == "accuracy" else f"{point[n]:,}" for n in names]
        table.add_row(*cells, style="bold" if i == artifact.meta["best"] else None)
    out.print(table)
    say(f"{artifact.meta['texts']:,} texts in {artifact.meta['pieces']:,} pieces{'' if built else ' (cached)'}")
    if target is not None:
        say(f"the model: {escape(target)}; name it as base_model")


def _run(process: StageProcess, request: Mapping[str, Any], progress: Callable[[int, int], None]) -> None:
    """Run a stage; when its model runs out of memory, again in a new process with half batches, as a run does.

    ``process`` has died then, which is as well for `adapt`: the one stage here with a model is the last.
    """
    from pipeline.worker import SMALLEST_SHARE, StageProcess

    try:
        process.run(request, progress)
    except OutOfMemory:
        share = request.get("batch_share", 1.0) / 2
        if share < SMALLEST_SHARE or not request["on_device"]:
            raise
        warn(f"{request['title']} ran out of memory; trying again with {share:.3g} of the usual batches", err)
        with StageProcess() as another:
            _run(another, {**request, "batch_share": share}, progress)


def _with_inputs(call: Any) -> list[Any]:
    """A call and all that it needs, each after what it needs."""
    found = []
    for part in call.inputs.values():
        found += _with_inputs(part)
    return [*found, call]


def _copy(model: Path, target: Path, half: bool) -> None:
    """Copy a model's directory under a temporary name, then rename it."""
    from safetensors.torch import load_file, save_file

    from pipeline.store import make_publishable

    beside = target.with_name(f".{target.name}.writing")
    with writing("the model", target, "choose another --out"):
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(model, beside)
        if half:
            file = beside / "model.safetensors"
            save_file({name: weight.half() for name, weight in load_file(file).items()}, file, {"format": "pt"})
        make_publishable(beside)
        beside.rename(target)
