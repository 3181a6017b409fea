"""Runs whose process is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun

from flows.leftover import is_gone


def run_of(pid: int | str, host: str = socket.gethostname()) -> FlowRun:
    return FlowRun(id=uuid4(), flow_id=uuid4(), infrastructure_pid=f"{host}:{pid}")


def test_a_run_is_gone_when_its_process_has_ended_and_not_before() -> None:
    run = run_of(0)
    environment = {**os.environ, "PREFECT__FLOW_RUN_ID": str(run.id)}
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        mine = run.model_copy(update={"infrastructure_pid": f"{socket.gethostname()}:{process.pid}"})
        assert process.stdout is not None
        process.stdout.readline()  # it has its own environment by now
        assert not is_gone(mine)
        process.kill()
    assert is_gone(mine)


def test_a_number_that_another_process_has_by_now_is_no_life() -> None:
    assert is_gone(run_of(os.getpid()))


@pytest.mark.parametrize("noted", [None, "", "uid:namespace:job-7", "elsewhere:1", f"{socket.gethostname()}:job"])
def test_what_ran_elsewhere_or_nowhere_yet_is_not_told_from_here(noted: str | None) -> None:
    assert not is_gone(FlowRun(id=uuid4(), flow_id=uuid4(), infrastructure_pid=noted))
