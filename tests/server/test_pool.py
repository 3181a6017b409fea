"""The pool engine on a real server with real workers: who runs what, and what a kill of one of them costs."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.server.cluster import wait_until
from tests.server.conftest import Job

pytestmark = pytest.mark.server


@pytest.mark.parametrize("job", [(8, 60)], indirect=True)
def test_schedule_fires_and_eight_annotators_fan_out_over_two_devices(job: Job) -> None:
    cluster = job.cluster
    nightly = next(found for found in cluster.ask("/deployments/filter", {}) if found["name"] == "nightly")
    soon = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
    schedule = {"interval": 86400, "anchor_date": soon, "timezone": "UTC"}
    once = [{"active": True, "schedule": schedule, "parameters": {"task": str(job.path)}, "slug": "soon"}]
    [made] = cluster.ask(f"/deployments/{nightly['id']}/schedules", once)

    def fired() -> list[dict[str, Any]]:
        wanted = {"deployments": {"id": {"any_": [nightly["id"]]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 1}
        return [run for run in cluster.ask("/flow_runs/filter", wanted) if run["state_type"] != "SCHEDULED"]

    wait_until(lambda: bool(fired()), 180)
    [run] = fired()
    assert run["auto_scheduled"]
    job.wait(run["id"])
    cluster.prefect("deployment", "schedule", "delete", "label/nightly", made["id"], "--accept-yes")
    job.assert_whole()
    records = job.records()
    assert len(list((job.store / "fit").iterdir())) == 8
    assert {record["device"] for record in records} == {"cpu-0", "cpu-1"}
    for device in ("cpu-0", "cpu-1"):
        mine = sorted((r["started"], r["started"] + r["seconds"]) for r in records if r["device"] == device)
        assert all(ended <= started for (_, ended), (started, _) in itertools.pairwise(mine))
    children = cluster.ask("/flow_runs/filter", {"flows": {"name": {"any_": ["stage"]}}})
    assert {child["work_queue_name"] for child in children} == {"nightly"}

    again = job.start()  # whatever the priority or the deployment: nothing of it is part of a key
    job.wait(again)
    job.assert_whole()
    assert len(cluster.ask("/flow_runs/filter", {"flows": {"name": {"any_": ["stage"]}}})) == len(children)


@pytest.mark.parametrize("victim", ["stage", "flow run", "worker"])
def test_killed_on_the_pool_the_run_goes_on_to_the_same_bytes(job: Job, victim: str) -> None:
    draw = random.Random(victim)
    run = job.start()
    job.wait_for_fits()
    time.sleep(draw.uniform(0, 12))
    if victim == "worker":
        os.kill(job.cluster.pids()[draw.choice(["gpu-0", "gpu-1"])], signal.SIGKILL)
        time.sleep(3)
        job.cluster("up")
    else:
        sign = "pipeline.worker" if victim == "stage" else "prefect.engine"
        found: list[int] = []
        wait_until(lambda: bool(found.extend(job.stage_side(sign)) or found), 60)
        os.kill(draw.choice(found), signal.SIGKILL)
    job.wait(run)
    job.assert_whole()
