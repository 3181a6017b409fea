"""The pool engine when more than one process is lost, a run is cancelled, waits for another, or can't work."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.server.cluster import marked, wait_until
from tests.server.conftest import Job

pytestmark = pytest.mark.server


def test_server_that_is_killed_and_comes_back_loses_nothing_of_a_run(job: Job) -> None:
    run = job.start()
    job.wait_for_fits()
    os.kill(job.cluster.pids()["server"], signal.SIGKILL)
    time.sleep(8)
    job.cluster("up")
    wait_until(lambda: job.state(run) in {"COMPLETED", "FAILED", "CRASHED"}, 300)
    if job.state(run) != "COMPLETED":  # a state that it could not report: the same command goes on from there
        job.wait(job.start())
    job.assert_whole()


def test_everything_killed_at_once_the_same_command_finishes_it(job: Job) -> None:
    job.start()
    job.wait_for_fits()
    for pid in marked(job.home):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not marked(job.home), 20)
    job.cluster("up")  # tells the server, too
    # Of a dead run the server would think until the heartbeats are missed, and leave its device idle.
    alive = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}
    assert job.cluster.ask("/flow_runs/count", alive) == 0
    job.wait(job.start())
    job.assert_whole()


def test_machine_that_died_has_its_run_marked_as_crashed(job: Job) -> None:
    run = job.start()
    job.wait_for_fits()
    time.sleep(35)  # two heartbeats
    dead = [pid for pid in marked(job.home) if pid != job.cluster.pids()["server"]]
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    assert job.state(run) == "RUNNING"  # nobody was left to say otherwise
    wait_until(lambda: job.state(run) == "CRASHED", 150)
    assert time.monotonic() - killed > 5
    job.cluster("up")
    job.wait(job.start())
    job.assert_whole()


@pytest.mark.parametrize("job", [(2, 500)], indirect=True)  # long enough for both devices to be at work at once
def test_cancelled_run_frees_its_devices_and_the_same_command_goes_on(job: Job) -> None:
    run = job.start()
    job.wait_for_fits(2)
    job.cluster.prefect("flow-run", "cancel", run)
    asked = time.monotonic()
    wait_until(lambda: not job.stage_side("pipeline.worker"), 60)
    assert time.monotonic() - asked < 30
    wait_until(lambda: job.state(run) == "CANCELLED", 60)
    job.wait(job.start())
    job.assert_whole()


def test_two_runs_at_once_take_turns_and_build_each_stage_once(job: Job) -> None:
    runs = [job.start(), job.start("label/nightly")]
    for run in runs:
        job.wait(run)
    job.assert_whole()
    logs = job.cluster.ask("/logs/filter", {"logs": {"flow_run_id": {"any_": runs}}, "limit": 200})
    assert any("waiting for another run that publishes to" in log["message"] for log in logs)


def test_user_error_fails_at_once_with_its_message_on_top(job: Job) -> None:
    run = job.start(task="nowhere/task.yaml")
    wait_until(lambda: job.state(run) == "FAILED", 60)
    found = job.cluster.ask(f"/flow_runs/{run}")
    assert "`clozeline init` writes one" in found["state"]["message"]
    assert found["run_count"] == 1
