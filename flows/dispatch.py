"""The one cached Prefect task that stands for every stage, and the processes it sends them to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.tasks import exponential_backoff

from flows import observer
from pipeline.errors import StageLost
from pipeline.plan import Call
from pipeline.store import Store
from pipeline.worker import StageProcesses

_ARTIFACT_SECONDS = 2.0
_processes: dict[str, StageProcesses] = {}
_executed: dict[str, list[str]] = {}


def register(run: str, processes: StageProcesses) -> None:
    """Make a run's processes known to its tasks (task parameters travel as JSON, processes can't)."""
    _processes[run] = processes
    _executed[run] = []


def unregister(run: str) -> list[str]:
    """Stop a run's processes; returns the titles of the stages that they executed, in the order of their ends."""
    _processes.pop(run).close()
    return _executed.pop(run)


def stop_all() -> None:
    """Stop the processes of every run; their artifacts stay unpublished."""
    for processes in list(_processes.values()):
        processes.close()


def _key(context: Any, parameters: Mapping[str, Any]) -> str:
    return f"{parameters['request']['stage']}-{parameters['request']['key']}"


def _transient(task: Any, task_run: Any, state: Any) -> bool:
    """Only a lost process may go better next time; one that the run itself stopped is no loss."""
    return isinstance(state.result(raise_on_failure=False), StageLost)


@task(
    name="stage",
    task_run_name="{title}",
    cache_policy=CacheKeyFnPolicy(cache_key_fn=_key),
    persist_result=True,
    result_serializer="json",
    retries=2,
    retry_delay_seconds=exponential_backoff(1),
    retry_condition_fn=_transient,
)
def stage_task(title: str, request: dict[str, Any], run: str) -> dict[str, Any]:
    """Run a stage and return a small reference to what it left in the store."""
    store = Store(Path(request["store"]))
    watcher = observer.current()
    found = store.find(request["stage"], request["key"])
    if found is not None:  # no process, and no device, is held for what is there
        return {"stage": request["stage"], "key": request["key"], "seconds": found.seconds}
    with _processes[run].lease() as process:
        watcher.started(request["key"], title)
        report = _ProgressArtifact(title, request["key"])

        def progress(done: int, total: int) -> None:
            watcher.progressed(request["key"], done, total)
            report(done, total)

        result = process.run(request, progress)
        watcher.built(request["key"], title, result["seconds"])
    if result["built"]:
        _executed[run].append(title)
    return {"stage": request["stage"], "key": request["key"], "seconds": result["seconds"]}


class _ProgressArtifact:
    """The progress of a long stage in the Prefect UI; drawing it never voids the stage."""

    def __init__(self, title: str, key: str) -> None:
        self._title, self._key = title, f"progress-{key[:16]}"
        self._id: UUID | None = None
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said < _ARTIFACT_SECONDS and not (self._id and done >= total):
            return
        self._said = now
        share = 100.0 * done / max(total, 1)
        try:
            if self._id is None:
                self._id = create_progress_artifact(share, key=self._key, description=self._title)  # type: ignore[assignment]
            else:
                update_progress_artifact(self._id, share)
        except Exception:  # a stage outweighs its progress bar, whatever the API says
            self._said = float("inf")


def submit(call: Call, store: Store, run: str, futures: Mapping[str, Any]) -> Any:
    """Submit a stage behind its inputs.

    The store is the truth and Prefect's cache its index: where the artifact is gone, the cached reference is
    not believed.
    """
    there = store.find(call.stage, call.key) is not None
    chosen = stage_task if there else stage_task.with_options(refresh_cache=True)
    waits = [futures[needed.key] for needed in call.inputs.values()]
    return chosen.submit(title=call.title, request=call.request(store), run=run, wait_for=waits)
