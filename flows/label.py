"""Label a dataset, from its task file to a published release: the review queue, the rest, the classifier."""

from __future__ import annotations

import json
import uuid
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.futures import as_completed
from prefect.runtime import flow_run
from prefect.settings import PREFECT_RESULTS_LOCAL_STORAGE_PATH, temporary_settings

from flows import dispatch, observer
from flows.parameters import shown
from flows.storage import use_storage_block
from flows.worker import end_with_worker
from pipeline.checks import check_task
from pipeline.errors import StoreDamaged
from pipeline.locations import is_url
from pipeline.plan import Call, Plan, plan_run
from pipeline.publishing import Published, publish, raise_if_held, release_lease, release_path
from pipeline.settings import EngineName, Settings
from pipeline.store import Artifact, Store, open_store
from pipeline.task import Task

_REBUILDS = 3
Priority = Literal["ad-hoc", "nightly"]


def _run_name() -> str:
    """The run is called after the task file, or after its directory where that is all that tells."""
    path = PurePosixPath(flow_run.parameters["task"])
    name = path.stem if path.stem != "task" else path.parent.name or Path.cwd().name
    return f"label {name}"


@flow(name="label", flow_run_name=_run_name, description=__doc__)
def label(
    task: Annotated[
        str,
        shown(
            "Task file",
            "An absolute path, a URL, or a path relative to the worker's CLOZELINE_HOME.",
            examples=["/data/tickets/task.yaml", "s3://bucket/tickets/task.yaml"],
        ),
    ],
    out: Annotated[
        str | None, shown("Release directory", "A path or URL; by default what the task file says, or releases/NAME.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        shown(
            "Settings",
            "dotted.key=value; each wins over the task file's.",
            examples=[["training.steps=100", "release.review_budget=200"]],
        ),
    ] = None,
    engine: Annotated[
        EngineName,
        shown(
            "Engine",
            "Where stages that run a model are executed: beside the run, on the workers of the pool gpu, on Ray, or on "
            "Dask. The result is the same.",
        ),
    ] = "local",
    priority: Annotated[
        Priority,
        shown("Priority", "The queue of the pool gpu that the stages join: ad-hoc goes before nightly."),
    ] = "ad-hoc",
    storage_block: Annotated[
        str | None,
        shown(
            "Storage block",
            "remote-file-system/NAME: a block with the credentials for URLs; by default the worker's environment has "
            "them.",
        ),
    ] = None,
) -> dict[str, Any]:
    """Label a dataset.

    Returns:
        The summary: release path and version, whether it is new, rows, label counts, test metrics, the stages
        that were executed and the seconds of each.

    Raises:
        InputError: the task or its data is wrong, which is mostly told before anything is run; or a disk is full.
        VersionHeld: all is done, and the version looks worse than the one in force, which stays.
    """
    end_with_worker()
    use_storage_block(storage_block)
    settings = Settings()
    loaded = Task.load(task if is_url(task) else settings.home / task, overrides or [])
    store = open_store(settings.store_location)
    warnings = check_task(loaded)
    release = release_path(loaded, out)

    def waiting(holder: str) -> None:
        text = f"waiting for another run that publishes to {release}: {holder}"
        get_run_logger().warning(text)
        observer.current().waiting(text)

    # Held from the plan on, since the plan depends on what was released before.
    with release_lease(release, waiting) as held:
        plan = plan_run(loaded, out)
        missing = plan.to_build(store)
        observer.current().planned(plan, missing)
        references = [(call.stage, call.key) for call in plan.calls]
        with store.using(references, {"run": str(flow_run.id), "release": release}):
            executed: list[str] = []
            for rebuilds_left in reversed(range(_REBUILDS + 1)):
                dispatcher = dispatch.Dispatcher(engine, store, priority, storage_block)
                try:
                    seconds = _run_stages(plan, {call.key for call in missing}, dispatcher)
                    artifact = _whole(plan.release, store)
                    break
                except StoreDamaged as error:  # it was put out of the store, so that this stage alone is built again
                    if not rebuilds_left:
                        raise
                    get_run_logger().warning("%s; it is built again", error)
                    missing = plan.to_build(store)
                finally:
                    executed += dispatcher.executed
            held.check()
            published = publish(artifact, release, loaded.release.gate)
            store.record_release(loaded.name, release, published.name, references)
    summary = {
        **artifact.meta,
        "release": published.path,
        "new": published.new,
        "warnings": [*warnings, *_left_out(plan, store)],
        "executed": executed,
        "seconds": seconds,
    }
    try:
        _draw(summary, plan, store, published)
    except Exception as error:  # the release is out; a table in the UI is no reason to call the run failed
        get_run_logger().warning("could not draw the artifacts: %s", error)
    # Last of all: what was computed is kept, and recorded as a release of its own.
    raise_if_held(published, release)
    return summary


def _whole(call: Call, store: Store) -> Artifact:
    """What a stage left, verified: no other stage reads, and so verifies, the last one's.

    Raises:
        StoreDamaged: it is gone, or was damaged and is now discarded.
    """
    found = store.find(call.stage, call.key)
    if found is None:
        raise StoreDamaged(f"what {call.title} left is gone")
    try:
        return store.fetch(found)
    except StoreDamaged:
        store.discard(call.stage, call.key)
        raise


def _run_stages(plan: Plan, missing: set[str], dispatcher: dispatch.Dispatcher) -> dict[str, float]:
    """Run all stages of a plan; returns the seconds of each kind.

    Raises:
        InputError: the user's data is at fault; whatever else runs is stopped.
    """
    run, store = uuid.uuid4().hex, dispatcher.store
    futures: dict[str, Any] = {}
    calls_of: dict[Any, list[Any]] = {}
    seconds = {call.stage: 0.0 for call in plan.calls}
    cache = {PREFECT_RESULTS_LOCAL_STORAGE_PATH: store.root / "prefect"}
    with dispatch.registered(run, dispatcher), temporary_settings(cache):
        for calls in dispatch.grouped(plan, missing, far=dispatcher.far):
            future = dispatch.submit(calls, store, run, futures, missing)
            futures |= {call.key: future for call in calls}
            calls_of[future] = calls
        for future in as_completed(list(calls_of)):
            if future.state.name == "NotReady":  # something that it needs failed, and tells more
                continue
            done = future.result()
            for call in calls_of[future]:
                seconds[call.stage] = round(seconds[call.stage] + done[call.key]["seconds"], 3)
                observer.current().finished(call.title)
    return seconds


def _left_out(plan: Plan, store: Store) -> list[str]:
    """What was dropped on the way, said aloud."""
    released = store.find(plan.release.stage, plan.release.key)
    diverged = released.meta.get("diverged", {}) if released else {}
    told = [f"the annotator {name} was left out, since its training diverged: {why}" for name, why in diverged.items()]
    [prepare] = plan.find("prepare")
    found = store.find(prepare.stage, prepare.key)
    meta = found.meta if found else {}
    if meta.get("labelled_in_pool"):
        told.append(f"{meta['labelled_in_pool']} unlabelled rows hold a labelled text and were left out")
    if meta.get("forgotten_in_pool"):
        told.append(f"{meta['forgotten_in_pool']} unlabelled rows hold a forgotten text and were left out")
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


def _draw(summary: dict[str, Any], plan: Plan, store: Store, published: Published) -> None:
    """Tables and links in the Prefect UI."""
    name = "".join(c if c.isalnum() else "-" for c in summary["name"].lower())
    total = max(sum(summary["label_counts"].values()), 1)
    rows = [
        {"label": label, "rows": count, "share": f"{100 * count / total:.1f} %"}
        for label, count in summary["label_counts"].items()
    ]
    create_table_artifact(rows, key=f"{name}-label-shares", description="Labels given")
    [blend] = plan.find("blend")
    found = store.find(blend.stage, blend.key)
    accuracies = found.meta["cv_accuracy"] if found else [None] * len(summary["weights"])
    weights = [
        {"annotator": who, "weight": weight, "cross-validated accuracy": accuracy}
        for (who, weight), accuracy in zip(summary["weights"].items(), accuracies, strict=True)
    ]
    create_table_artifact(weights, key=f"{name}-annotators", description="Annotators, weights and accuracies")
    if summary["test"]:
        tested = [{"method": method, **(found or {})} for method, found in summary["test"].items()]
        create_table_artifact(tested, key=f"{name}-test", description="Accuracy on the test file")
    brief: dict[str, Any] = {key: summary[key] for key in ("release", "new", "rows", "executed", "seconds")}
    if published.held:
        brief["held"] = published.held
    markdown = f"# {published.name}\n\n```json\n{json.dumps(brief, indent=1)}\n```\n"
    create_markdown_artifact(markdown, key=f"{name}-release", description="The release")
    create_link_artifact(published.uri, key=f"{name}-link", link_text=published.path)
