"""The main flow: from a task file to a published, labelled dataset."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run
from prefect.settings import PREFECT_RESULTS_LOCAL_STORAGE_PATH, temporary_settings
from pydantic import Field

from flows import dispatch, observer
from pipeline.checks import check_task
from pipeline.device import cuda_devices
from pipeline.errors import StageFailed
from pipeline.plan import Plan, plan_run
from pipeline.release import Published, publish, release_path
from pipeline.settings import Settings
from pipeline.store import Store
from pipeline.task import Task
from pipeline.worker import StageProcesses


def _run_name() -> str:
    """The run is called after the task file, or after its directory where that is all that tells."""
    path = Path(flow_run.parameters["task"])
    return f"label {path.stem if path.stem != 'task' else path.absolute().parent.name}"


@flow(name="label", flow_run_name=_run_name, description=__doc__)
def label(
    task: Annotated[str, Field(description="The task file; a relative path starts from CLOZELINE_HOME")],
    out: Annotated[str | None, Field(description="The release directory; by default what the task says")] = None,
    overrides: Annotated[
        list[str] | None, Field(description="dotted.key=value settings that win over the file's")
    ] = None,
) -> dict[str, Any]:
    """Label a dataset.

    Returns:
        The summary: release path and version, whether it is new, rows, label counts, test metrics, the stages
        that were executed and the seconds of each.

    Raises:
        InputError: the task or its data is wrong; nothing was run.
    """
    settings = Settings()
    loaded = Task.load(settings.home / task, overrides or [])
    store = Store(settings.store_path)
    warnings = check_task(loaded)
    plan = plan_run(loaded, out)
    observer.current().planned(plan, plan.to_build(store))
    run = uuid.uuid4().hex
    processes = StageProcesses(cuda_devices())
    dispatch.register(run, processes)
    executed: list[str] = []
    try:
        with temporary_settings({PREFECT_RESULTS_LOCAL_STORAGE_PATH: store.root / "prefect"}):
            futures: dict[str, Any] = {}
            for call in plan.calls:
                futures[call.key] = dispatch.submit(call, store, run, futures)
            results = {}
            for call in plan.calls:
                results[call.key] = futures[call.key].result()
                observer.current().finished(call.title)
    finally:
        executed = dispatch.unregister(run)
    artifact = store.find(plan.release.stage, plan.release.key)
    if artifact is None:
        raise StageFailed("the release stage left nothing in the store")
    published = publish(artifact, release_path(loaded, out))
    seconds: dict[str, float] = {}
    for call in plan.calls:
        seconds[call.stage] = round(seconds.get(call.stage, 0.0) + results[call.key]["seconds"], 3)
    summary = {
        **artifact.meta,
        "release": str(published.path),
        "new": published.new,
        "warnings": [*warnings, *_left_out(plan, store)],
        "executed": executed,
        "seconds": seconds,
    }
    try:
        _draw(summary, published)
    except Exception as error:  # the release is out; a table in the UI is no reason to call the run failed
        get_run_logger().warning("could not draw the artifacts: %s", error)
    return summary


def _left_out(plan: Plan, store: Store) -> list[str]:
    """What was dropped on the way, said aloud."""
    told = []
    [prepare] = plan.find("prepare")
    found = store.find(prepare.stage, prepare.key)
    meta = found.meta if found else {}
    if meta.get("labelled_in_pool"):
        told.append(f"{meta['labelled_in_pool']} unlabelled rows hold a labelled text and were left out")
    if meta.get("labelled_in_test"):
        told.append(f"{meta['labelled_in_test']} test rows hold a labelled text and were left out")
    for call in plan.find("ingest"):
        ingested = store.find(call.stage, call.key)
        if ingested and ingested.meta["quarantined"]:
            told.append(
                f"{ingested.meta['quarantined']} rows of {call.label} have no text: {ingested.path}/quarantine.parquet"
            )
        if ingested and ingested.meta.get("dropped"):
            told.append(f"{ingested.meta['dropped']} rows of {call.label} repeat a labelled text and were dropped")
    return told


def _draw(summary: dict[str, Any], published: Published) -> None:
    """Tables and links in the Prefect UI."""
    name = "".join(c if c.isalnum() else "-" for c in summary["name"].lower())
    rows = [{"label": label, "rows": count} for label, count in summary["label_counts"].items()]
    create_table_artifact(rows, key=f"{name}-label-shares", description="Labels given")
    weights = [{"annotator": who, "weight": weight} for who, weight in summary["weights"].items()]
    create_table_artifact(weights, key=f"{name}-annotators", description="Annotators and their weights")
    if summary["test"]:
        tested = [{"method": method, **(found or {})} for method, found in summary["test"].items()]
        create_table_artifact(tested, key=f"{name}-test", description="Accuracy on the test file")
    brief = {key: summary[key] for key in ("release", "new", "rows", "executed", "seconds")}
    markdown = f"# {published.path.name}\n\n```json\n{json.dumps(brief, indent=1)}\n```\n"
    create_markdown_artifact(markdown, key=f"{name}-release", description="The release")
    create_link_artifact(published.path.as_uri(), key=f"{name}-link", link_text=str(published.path))
