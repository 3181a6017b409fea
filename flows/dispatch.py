"""The one cached Prefect task that stands for every stage, and the engine that it sends them to."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.tasks import exponential_backoff

from flows import observer
from flows.pool import PoolEngine
from flows.progress import ProgressArtifact
from pipeline.engines import Engine
from pipeline.engines.dask import DaskEngine
from pipeline.engines.local import LocalEngine
from pipeline.engines.ray import RayEngine
from pipeline.errors import OutOfMemory, RunStopped, StageLost, StorageTrouble
from pipeline.plan import Call, Plan
from pipeline.settings import EngineName
from pipeline.store import Store, key_of
from pipeline.worker import SMALLEST_SHARE

RETRIES = 4
# A task run costs the server more than a small stage costs this machine: small stages of one kind share one, until
# it lasts minutes; no more of them than a server on SQLite takes at once. Elsewhere than beside the flow a stage run
# takes seconds to begin, and fewer are enough.
_GROUP_SECONDS, _MOST_GROUPS, _FEWEST_GROUPS, _FEWEST_FAR = 120.0, 100, 8, 2
# What there is one of for each file; far away, what there is one of for each annotator and is soon done, too.
_GROUPED = frozenset({"ingest", "label"})
_GROUPED_FAR = _GROUPED | {"annotate"}


class Dispatcher:
    """What one run sends its stages through: its engine, its store, and what it has learned of them.

    Args:
        engine: where stages that run a model are executed; all others run in processes beside the flow.
        store: the artifact store.
        queue: the work queue of the engine ``pool``.
        storage_block: the block with the storage's credentials, for the workers of the engine ``pool``.
    """

    def __init__(self, engine: EngineName, store: Store, queue: str, storage_block: str | None = None) -> None:
        self.store, self.far = store, engine != "local"
        self.executed: list[str] = []
        self._beside = LocalEngine()
        self._far: Engine = self._beside
        if engine == "pool":
            self._far = PoolEngine(queue, storage_block)
        elif engine == "ray":
            self._far = RayEngine()
        elif engine == "dask":
            self._far = DaskEngine()
        self._lock = threading.Lock()
        self._shares: dict[str, float] = {}
        self._sent: set[str] = set()

    def run(self, title: str, requests: Sequence[Mapping[str, Any]], progress: Any) -> dict[str, dict[str, Any]]:
        """Run what the store does not have; returns the seconds of each by key."""
        found = {request["key"]: self.store.find(request["stage"], request["key"]) for request in requests}
        seconds = {key: {"seconds": artifact.seconds} for key, artifact in found.items() if artifact is not None}
        missing = [request for request in requests if found[request["key"]] is None]
        if not missing:  # no process, and no device, is held for what is there
            return seconds
        sent = [{**request, "batch_share": self._shares.get(request["key"], 1.0)} for request in missing]
        keys = [request["key"] for request in missing]
        self._sent |= set(keys)
        engine = self._far if sent[0]["on_device"] else self._beside
        try:
            results = engine.run(title, sent, progress)
        except OutOfMemory:
            # Only then: half batches may change the last bits, and a process that was killed goes on as it was.
            with self._lock:
                for key in keys:
                    self._shares[key] = max(self._shares.get(key, 1.0) / 2, SMALLEST_SHARE)
            raise
        built = {request["key"] for request, result in zip(missing, results, strict=True) if result["built"]}
        with self._lock:  # what an earlier try built before its process was lost is this run's work, too
            titles = {request["key"]: request["title"] for request in requests}
            self.executed += [titles[key] for key in titles if key in built | (self._sent & seconds.keys())]
            self._sent -= titles.keys()
        return seconds | {
            request["key"]: {"seconds": result["seconds"]} for request, result in zip(missing, results, strict=True)
        }

    def close(self) -> None:
        """Stop whatever runs; artifacts that are half built stay unpublished."""
        try:
            self._far.close()
        finally:
            self._beside.close()


_dispatchers: dict[str, Dispatcher] = {}


@contextmanager
def registered(run: str, dispatcher: Dispatcher) -> Iterator[None]:
    """Make a run's dispatcher known to its tasks (parameters travel as JSON, an engine can't); stop it at the end."""
    _dispatchers[run] = dispatcher
    try:
        yield
    finally:
        _dispatchers.pop(run).close()


def stop_all() -> None:
    """Stop the stages of every run of this process."""
    for dispatcher in list(_dispatchers.values()):
        dispatcher.close()


def _key(context: Any, parameters: Mapping[str, Any]) -> str:
    requests = parameters["requests"]
    if len(requests) == 1:
        return f"{requests[0]['stage']}-{requests[0]['key']}"
    return f"{requests[0]['stage']}-{key_of([request['key'] for request in requests])}"


def _transient(task: Any, task_run: Any, state: Any) -> bool:
    """Only what may go better next time: a lost process, memory that half batches may spare, a storage hiccup."""
    return isinstance(state.result(raise_on_failure=False), StageLost | StorageTrouble)


@task(
    name="stage",
    task_run_name="{title}",
    cache_policy=CacheKeyFnPolicy(cache_key_fn=_key),
    persist_result=True,
    result_serializer="json",
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(1),
    retry_condition_fn=_transient,
)
def stage_task(title: str, requests: list[dict[str, Any]], run: str) -> dict[str, dict[str, Any]]:
    """Run stages of one kind and return the seconds of each by key."""
    watch = key_of([request["key"] for request in requests])
    watcher, report = observer.current(), ProgressArtifact(title, watch)
    begun = False

    def progress(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            watcher.started(watch, title)
            begun = True
        watcher.progressed(watch, done, total)
        report(done, total)

    try:
        if run not in _dispatchers:
            raise RunStopped("the run was stopped")
        done = _dispatchers[run].run(title, requests, progress)
    except BaseException:
        if begun:
            watcher.lost(watch)
        raise
    if begun:
        watcher.built(watch, title, sum(found["seconds"] for found in done.values()))
    return done


def grouped(plan: Plan, missing: set[str], *, far: bool) -> list[list[Call]]:
    """The plan's calls, small ones of one kind together, in an order in which each follows what it needs.

    Args:
        plan: the calls.
        missing: the keys that the store does not have; what it has is grouped apart.
        far: whether stages run elsewhere than beside the flow.
    """
    groups: list[list[Call]] = []
    alike: dict[tuple[str, str, int, bool], list[Call]] = {}
    for call in plan.calls:
        if call.stage not in (_GROUPED_FAR if far else _GROUPED):
            groups.append([call])
            continue
        rows = call.inputs["rows"].key if call.stage == "annotate" else ""
        kind = call.stage, rows, call.generation, call.key in missing  # a generation needs the one before
        if kind not in alike:
            groups.append(alike.setdefault(kind, []))
        alike[kind].append(call)
    fewest = _FEWEST_FAR if far else _FEWEST_GROUPS
    return [part for group in groups for part in _parts(plan, group, fewest)]


def _parts(plan: Plan, calls: list[Call], fewest: int) -> list[list[Call]]:
    seconds = sum(plan.seconds(call) for call in calls)
    count = min(max(int(seconds / _GROUP_SECONDS) + 1, fewest), _MOST_GROUPS, len(calls))
    bounds = [len(calls) * i // count for i in range(count + 1)]
    return [calls[start:stop] for start, stop in itertools.pairwise(bounds)]


def submit(calls: Sequence[Call], store: Store, run: str, futures: Mapping[str, Any], missing: set[str]) -> Any:
    """Submit stages behind their inputs.

    The store is the truth and Prefect's cache its index: where an artifact is gone, the cached reference is not
    believed.
    """
    gone = any(call.key in missing for call in calls)
    chosen = stage_task.with_options(refresh_cache=True) if gone else stage_task
    title = calls[0].title + (f" and {len(calls) - 1} more" if len(calls) > 1 else "")
    mine = {call.key for call in calls}
    needed = {call.key for calling in calls for call in calling.inputs.values()} - mine
    requests = [{**call.request(store), "on_device": call.on_device} for call in calls]
    return chosen.submit(title=title, requests=requests, run=run, wait_for=list({futures[key] for key in needed}))
