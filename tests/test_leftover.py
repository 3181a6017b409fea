"""Runs whose process is gone, on a real server."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import Worker
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Pending, Running

from flows import leftover
from flows.leftover import tell_of_gone
from tests.prefect_server import prefect_server

pytestmark = pytest.mark.prefect
ENDED = 2**22 + 1  # above the highest number that a process can have


@flow
def nothing() -> None:
    """Never called: it only has runs."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """Of a server with the pools `here`, whose worker is on this machine, and `several`, which has another's, too."""
    with prefect_server(tmp_path_factory.mktemp("prefect")) as environment:
        api = {PREFECT_API_URL: environment["PREFECT_API_URL"]}
        with temporary_settings(api), get_client(sync_client=True) as one:
            for pool, machines in (("here", [platform.node()]), ("several", [platform.node(), "elsewhere"])):
                one.create_work_pool(WorkPoolCreate(name=pool, type="process"))
                for machine in machines:
                    one.send_worker_heartbeat(pool, f"{machine}-gpu-0", heartbeat_interval_seconds=30)
            yield one


def state_after(client: SyncPrefectClient, run: UUID, pid: int | str | None) -> str | None:
    """What the server says of a run, once it has been told of those that are gone."""
    client.update_flow_run(run, infrastructure_pid=None if pid is None else str(pid))
    tell_of_gone(client)
    return client.read_flow_run(run).state_name


def run_in(client: SyncPrefectClient, pool: str) -> UUID:
    return client.create_flow_run(nothing, state=Running(), work_pool_name=pool).id


def test_a_run_is_gone_when_its_process_has_ended_and_not_before(client: SyncPrefectClient) -> None:
    run = run_in(client, "here")
    environment = {**os.environ, "PREFECT__FLOW_RUN_ID": str(run)}
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has its own environment by now
        assert state_after(client, run, process.pid) == "Running"
        process.kill()
    assert state_after(client, run, process.pid) == "Crashed"


def test_a_number_that_another_process_has_by_now_is_no_life(client: SyncPrefectClient) -> None:
    assert state_after(client, run_in(client, "here"), os.getpid()) == "Crashed"


@pytest.mark.parametrize("noted", [None, "namespace:job-7"])
def test_what_has_no_process_yet_or_is_none_is_left_alone(client: SyncPrefectClient, noted: str | None) -> None:
    assert state_after(client, run_in(client, "here"), noted) == "Running"


def test_a_run_whose_worker_died_in_the_handover_is_gone_after_a_while(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = client.create_flow_run(nothing, state=Pending(), work_pool_name="here").id
    assert tell_of_gone(client)  # there may be a process yet
    assert client.read_flow_run(run).state_name == "Pending"
    monkeypatch.setattr(leftover, "HANDOVER_SECONDS", 0.0)
    assert state_after(client, run, None) == "Crashed"
    assert not tell_of_gone(client)


def test_what_may_run_on_another_machine_is_not_told_from_here(client: SyncPrefectClient) -> None:
    assert state_after(client, run_in(client, "several"), ENDED) == "Running"
    assert state_after(client, run_in(client, "here"), ENDED) == "Crashed"


def test_each_pool_is_asked_for_once_however_many_runs_are_gone(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_in(client, pool) for pool in ("here", "several", "here", "several")]
    for run in runs:
        client.update_flow_run(run, infrastructure_pid=str(ENDED))
    asked = []
    ask = client.read_workers_for_work_pool

    def counted(pool: str) -> list[Worker]:
        asked.append(pool)
        return ask(pool)

    monkeypatch.setattr(client, "read_workers_for_work_pool", counted)
    tell_of_gone(client)
    assert sorted(asked) == ["here", "several"]
    assert [client.read_flow_run(run).state_name for run in runs] == ["Crashed", "Running"] * 2
