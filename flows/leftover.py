"""Runs that the server takes for alive although their process is gone.

A worker notes the process of each run that it starts. Where machine and process died at once, or the worker did before
the run had begun, nobody tells the server, and the run counts against its pool's limit: a device stays idle.
"""

from __future__ import annotations

import platform
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Crashed

_ALIVE = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])


def tell_of_gone(client: SyncPrefectClient) -> None:
    """Mark the runs of this machine whose processes are gone as crashed."""
    for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=_ALIVE))):
        if is_gone(client, run):
            client.set_flow_run_state(run.id, Crashed(message="its process is gone"), force=True)


def is_gone(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether a run's process was on this machine, and is no more."""
    if run.work_pool_name is None or not (run.infrastructure_pid or "").isdigit():
        return False
    if _process_lives(run):
        return False
    # The note says which process and not where; the workers that `deploy/cluster.sh` starts bear the machine's name.
    here = f"{platform.node()}-"
    workers = client.read_workers_for_work_pool(run.work_pool_name)
    return bool(workers) and all(worker.name.startswith(here) for worker in workers)


def _process_lives(run: FlowRun) -> bool:
    """Whether there is such a process, and it is that run's and not another's with the number of one that ended."""
    try:
        environment = Path(f"/proc/{run.infrastructure_pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:  # somebody else's, so one that lives
        return True
    return f"PREFECT__FLOW_RUN_ID={run.id}".encode() in environment.split(b"\0")
