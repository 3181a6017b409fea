"""Runs that the server takes for alive although their process is gone.

A worker notes the process of each run that it starts. Where machine and process died at once, or the worker did before
the run had begun, nobody tells the server, and the run counts against its pool's limit: a device stays idle.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Crashed

_ALIVE = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
# A worker starts the process of a run that it took over within a second; on a busy machine six were seen.
HANDOVER_SECONDS = 15.0


def tell_of_gone(client: SyncPrefectClient) -> bool:
    """Mark the runs of this machine whose processes are gone as crashed.

    Returns:
        Whether a run is being handed over just now, so that it will be known in `HANDOVER_SECONDS`.
    """
    in_between = False
    here = cache(lambda pool: _is_here(client, pool))
    for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=_ALIVE))):
        if _is_gone(run, here):
            client.set_flow_run_state(run.id, Crashed(message="its process is gone"), force=True)
        elif not run.infrastructure_pid and run.work_pool_name is not None and run.state_type == StateType.PENDING:
            in_between = True
    return in_between


def is_gone(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether a run's process was on this machine, and is no more."""
    return _is_gone(run, lambda pool: _is_here(client, pool))


def _is_gone(run: FlowRun, here: Callable[[str], bool]) -> bool:
    """See `is_gone`; ``here`` tells whether the runs of a work pool are processes of this machine."""
    if run.work_pool_name is None or run.state is None:
        return False
    if run.infrastructure_pid:
        if not run.infrastructure_pid.isdigit() or _process_lives(run):
            return False
    elif not run.state.is_pending() or (datetime.now(UTC) - run.state.timestamp).total_seconds() < HANDOVER_SECONDS:
        return False
    return here(run.work_pool_name)


def _is_here(client: SyncPrefectClient, pool: str) -> bool:
    """Whether all workers of a pool are on this machine, and start processes."""
    # A run says which process it has and not where; the workers that `deploy/cluster.sh` starts bear the machine's
    # name, and start processes.
    ours = re.compile(re.escape(platform.node()) + "-(cpu|gpu-.+)")
    workers = client.read_workers_for_work_pool(pool)
    return (
        client.read_work_pool(pool).type == "process"
        and bool(workers)
        and all(ours.fullmatch(worker.name) for worker in workers)
    )


def _process_lives(run: FlowRun) -> bool:
    """Whether there is such a process, and it is that run's and not another's with the number of one that ended."""
    try:
        environment = Path(f"/proc/{run.infrastructure_pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:  # somebody else's, so one that lives
        return True
    return f"PREFECT__FLOW_RUN_ID={run.id}".encode() in environment.split(b"\0")
