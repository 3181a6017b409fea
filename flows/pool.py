"""The engine `pool`: stages as flow runs of `stage/gpu`, which the workers of the work pool `gpu` take."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Cancelling, Crashed

from flows.leftover import is_gone, tell_of_gone
from pipeline.engines import Request
from pipeline.errors import ClozelineError, InputError, RunStopped, StageLost, rebuilt
from pipeline.progress import Progress

DEPLOYMENT = "stage/gpu"
_POLL_SECONDS = 2.0
# A server that is restarted is back within minutes; the stages go on meanwhile.
_SERVER_PATIENCE = 600.0
_WORKER_PATIENCE = 60.0
# A worker that dies while it hands a run over leaves it pending, and nobody sends heartbeats for it. A process begins
# within seconds; other infrastructure may have to fetch an image first.
_HANDOVER_PATIENCE = {"process": 60.0}
_SLOW_HANDOVER_PATIENCE = 900.0


class PoolEngine:
    """Creates a flow run for each group of stages and waits for it.

    Args:
        queue: the work queue, hence the priority, of the stages.
        storage_block: the Prefect block with the storage's credentials, for the workers.
    """

    def __init__(self, queue: str, storage_block: str | None) -> None:
        self._queue, self._storage_block = queue, storage_block
        self._lock = threading.Lock()
        self._running: set[UUID] = set()
        self._closed = False

    def run(self, title: str, requests: Sequence[Request], progress: Progress) -> list[dict[str, Any]]:
        """See `pipeline.engines.Engine.run`; the progress itself is drawn by the stage's own flow run."""
        run_id = self._create(title, requests)
        with self._lock:
            self._running.add(run_id)
        try:
            if self._closed:
                self._cancel(run_id)
            return self._results(title, self._wait(title, run_id, progress))
        finally:
            self._running.discard(run_id)

    def _create(self, title: str, requests: Sequence[Request]) -> UUID:
        parameters = {"title": title, "requests": list(requests), "storage_block": self._storage_block}
        began, once = time.monotonic(), uuid.uuid4().hex
        while not self._closed:
            try:
                created: Any = run_deployment(
                    DEPLOYMENT,
                    parameters=parameters,
                    flow_run_name=title,
                    work_queue_name=self._queue,
                    timeout=0,
                    idempotency_key=once,  # a request that is repeated must not make a second run
                )
                return UUID(str(created.id))
            except ObjectNotFound:
                raise InputError(
                    f"the server has no deployment {DEPLOYMENT}, which the engine pool needs",
                    where="engine",
                    fix="deploy/cluster.sh up, or prefect --no-prompt deploy --all",
                ) from None
            except (httpx.TransportError, PrefectHTTPStatusError) as error:
                if time.monotonic() - began > _SERVER_PATIENCE:
                    raise ClozelineError(f"the Prefect server does not answer: {error}") from error
                time.sleep(_POLL_SECONDS)
        raise RunStopped("the run was stopped")

    def _wait(self, title: str, run_id: UUID, progress: Progress) -> FlowRun:
        answered = looked = time.monotonic()
        begun = warned = False
        pending: float | None = None  # since when, by this machine's clock
        with get_client(sync_client=True) as client:
            while True:
                try:
                    found = client.read_flow_run(run_id)
                    answered = time.monotonic()
                    waits = found.state is not None and found.state.is_pending()
                    pending = (pending or answered) if waits else None
                    if pending is not None and _give_up(client, found, answered - pending):
                        raise StageLost(f"the worker that took {title} did not begin it")
                except ObjectNotFound:
                    raise ClozelineError(f"the flow run of {title} was deleted") from None
                except (httpx.TransportError, PrefectHTTPStatusError) as error:
                    if time.monotonic() - answered > _SERVER_PATIENCE:
                        raise ClozelineError(f"the Prefect server does not answer: {error}") from error
                    time.sleep(_POLL_SECONDS)
                    continue
                state = found.state
                if state is not None and state.is_final():
                    return found
                if state is not None and state.is_running() and not begun:
                    begun = True
                    progress(0, 1)
                if time.monotonic() - looked > _WORKER_PATIENCE:
                    looked = time.monotonic()
                    with suppress(httpx.TransportError, PrefectHTTPStatusError):
                        _sweep_abandoned(client)
                    if not begun and not warned:
                        warned = True
                        get_run_logger().warning(
                            "no worker has taken %r for %.0f s: all are busy, or none runs "
                            "(prefect worker start --pool gpu)",
                            title,
                            _WORKER_PATIENCE,
                        )
                time.sleep(_POLL_SECONDS)

    def _results(self, title: str, run: FlowRun) -> list[dict[str, Any]]:
        state = run.state
        assert state is not None
        message = state.message or ""
        if state.is_completed():
            return list(json.loads(message))
        if state.is_failed():
            raise rebuilt(state.name or "", message)
        if self._closed:
            raise RunStopped(f"the run was stopped during {title}")
        if state.is_cancelled():
            raise ClozelineError(f"{title} was cancelled")
        raise StageLost(f"the worker lost {title}: {message}")

    def close(self) -> None:
        """Cancel the flow runs that are under way: their workers then end them and free their devices."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for run_id in running:
            self._cancel(run_id)

    def _cancel(self, run_id: UUID) -> None:
        with get_client(sync_client=True) as client, suppress(httpx.HTTPError, PrefectHTTPStatusError, ObjectNotFound):
            state = client.read_flow_run(run_id).state
            if state is not None and not state.is_final():
                begun = state.is_running() or state.is_pending()
                client.set_flow_run_state(run_id, Cancelling() if begun else Cancelled(), force=not begun)


def _give_up(client: SyncPrefectClient, run: FlowRun, pending: float) -> bool:
    """Mark a run that a worker took and never began as crashed; returns whether that was so.

    It would count against the pool's limit for ever, and keep a device idle.
    """
    if run.work_pool_name is None:
        return False
    if not is_gone(client, run):
        kind = client.read_work_pool(run.work_pool_name).type
        if pending <= _HANDOVER_PATIENCE.get(kind, _SLOW_HANDOVER_PATIENCE):
            return False
    crashed = Crashed(message=f"no worker began it in the {pending:.0f} s since one took it")
    client.set_flow_run_state(run.id, crashed, force=True)
    return True


def _sweep_abandoned(client: SyncPrefectClient) -> None:
    """Give up the pending runs of all, also of those whose parents died with their workers.

    Where nobody can tell from here whether a process is gone, it takes two machines' clocks; three times as long is
    given.
    """
    tell_of_gone(client)
    pending = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING]))
    stages = FlowFilter(name=FlowFilterName(any_=[DEPLOYMENT.split("/")[0]]))
    for run in client.read_flow_runs(flow_filter=stages, flow_run_filter=FlowRunFilter(state=pending)):
        if run.state is not None:
            _give_up(client, run, (datetime.now(UTC) - run.state.timestamp).total_seconds() / 3)
