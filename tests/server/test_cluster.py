"""deploy/cluster.sh with a real server and real workers."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.server.cluster import ROOT, Cluster, marked, wait_until

HEARTBEATS = "mark runs without heartbeats as crashed"

pytestmark = pytest.mark.server


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Make a cluster; whatever a test leaves running is ended."""
    made = []

    def make(**environment: str) -> Cluster:
        made.append(Cluster(tmp_path / f"home {len(made)}", **environment))
        return made[-1]

    yield make
    for one in made:
        one("down")
        assert not one.pids()


def test_up_configures_a_server_restarts_what_died_and_down_ends_just_its_own(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    one = cluster()
    said = one("up")
    assert one.api in said
    first, pids = one.content(), one.pids()
    assert set(pids) == {"server", "cpu", "gpu-0", "gpu-1"}
    assert {name: kind for name, (_, kind, _) in first["pools"].items()} == {"cpu": "process", "gpu": "process"}
    assert first["pools"]["gpu"][2] == 2  # as many stages as there are workers
    for queues in first["queues"].values():
        assert queues["ad-hoc"] < queues["nightly"] < queues["default"]
    document = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    wanted = [deployment["name"] for deployment in document["deployments"]]
    assert sorted(first["deployments"].values()) == sorted(wanted)
    triggers = sum(len(deployment.get("triggers", [])) for deployment in document["deployments"])
    assert len(first["automations"]) == triggers + 1
    assert first["automations"].count((HEARTBEATS, True)) == 1

    wait_until(lambda: len(one.ask("/work_pools/gpu/workers/filter", {})) == 2, 30)
    assert [worker["status"] for worker in one.ask("/work_pools/gpu/workers/filter", {})] == ["ONLINE", "ONLINE"]
    devices = {psutil.Process(pids[name]).environ()["CLOZELINE_DEVICE"] for name in ("gpu-0", "gpu-1")}
    assert devices == {"cpu-0", "cpu-1"}
    # Nothing listens but on the loopback interface.
    listening = [
        connection.laddr.ip
        for pid in marked(tmp_path)
        for connection in psutil.Process(pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1"}

    # What somebody switches is theirs to switch back.
    scheduled = next(found for found in one.ask("/deployments/filter", {}) if found["name"] == "nightly")
    name = f"{one.ask('/flows/' + scheduled['flow_id'])['name']}/{scheduled['name']}"
    assert [schedule["active"] for schedule in scheduled["schedules"]] == [False]
    one.prefect("deployment", "schedule", "resume", name, scheduled["schedules"][0]["id"])
    one.prefect("deployment", "schedule", "create", name, "--cron", "0 4 * * *", "--timezone", "Europe/Berlin")
    for automation, _ in first["automations"]:
        one.prefect("automation", "pause", automation)

    one.environment["CLOZELINE_SILENCE"] = "400"
    one("up")
    again = one.content()
    assert again == first | {"automations": [(automation, False) for automation, _ in first["automations"]]}
    assert one.pids() == pids
    schedules = one.ask(f"/deployments/{scheduled['id']}")["schedules"]
    assert sorted((found["schedule"].get("cron"), found["active"]) for found in schedules) == sorted(
        [(scheduled["schedules"][0]["schedule"].get("cron"), True), ("0 4 * * *", True)]
    )
    [heartbeats] = [found for found in one.ask("/automations/filter", {}) if found["name"] == HEARTBEATS]
    assert heartbeats["trigger"]["within"] == 400

    os.kill(pids["gpu-1"], signal.SIGKILL)
    assert "gpu-1    DIED" in one("status", code=1)
    one("up")
    assert {name for name, pid in one.pids().items() if pids[name] != pid} == {"gpu-1"}
    one("status")

    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "prefect worker start"])
    # The number of a member that is gone was given to another process.
    os.kill(one.pids()["gpu-0"], signal.SIGKILL)
    file = one.state / "gpu-0.pid"
    file.write_text(f"{bystander.pid} {file.read_text().split(maxsplit=1)[1]}")
    try:
        one("down")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert marked(tmp_path) == []
    one("status", code=1)
    one("down")  # twice does no harm


def test_a_server_that_others_can_reach_needs_a_password_and_asks_for_it(cluster: Callable[..., Cluster]) -> None:
    exposed = {"CLOZELINE_SERVER_HOST": "0.0.0.0"}
    said = cluster(**exposed)("up", code=2)
    assert "has no password" in said
    assert "PREFECT_SERVER_API_AUTH_STRING" in said

    one = cluster(**exposed, PREFECT_SERVER_API_AUTH_STRING="admin:s3cret")
    said = one("up")
    assert "s3cret" not in said
    body: dict[str, Any] = {}
    credentials = {"Authorization": "Basic " + base64.b64encode(b"admin:s3cret").decode()}
    assert httpx.get(f"{one.api}/health").status_code == 200  # for probes; tells nothing
    assert httpx.get(f"{one.api}/admin/version").status_code == 401
    assert httpx.get(f"{one.api}/csrf-token", params={"client": "test"}).status_code == 401
    assert httpx.post(f"{one.api}/flow_runs/filter", json=body).status_code == 403
    assert httpx.get(f"{one.api}/admin/version", headers=credentials).status_code == 200
    wrong = {"Authorization": "Basic " + base64.b64encode(b"admin:guess").decode()}
    assert httpx.get(f"{one.api}/admin/version", headers=wrong).status_code == 401
    # A page in the browser of somebody who is logged in can send the password, but has no token.
    assert httpx.post(f"{one.api}/flow_runs/filter", json=body, headers=credentials).status_code == 403
    one.environment["PREFECT_API_AUTH_STRING"] = "admin:s3cret"
    assert "gpu" in one.prefect("work-pool", "ls")
    one.prefect("work-pool", "set-concurrency-limit", "gpu", "3")  # a change: with a token
    arguments = {argument for pid in one.pids().values() for argument in psutil.Process(pid).cmdline()}
    assert not any("s3cret" in argument for argument in arguments)  # anybody on the machine can read these
    one("up")
    del one.environment["PREFECT_SERVER_API_AUTH_STRING"]
    one.environment["CLOZELINE_SERVER_HOST"] = "127.0.0.1"
    del one.environment["PREFECT_API_AUTH_STRING"]
    assert "another password" in one("up", code=2)


def test_a_port_that_somebody_else_uses_is_left_to_them(cluster: Callable[..., Cluster]) -> None:
    one = cluster()
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(one.port), "--bind", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", one.port)) == 0, 10)
        assert "CLOZELINE_PORT" in one("up", code=2)
        assert one.pids() == {}
    finally:
        server.kill()
        server.wait()


def test_gpus_that_the_driver_does_not_tell_are_an_error_and_not_none(tmp_path: Path) -> None:
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    broken.chmod(0o755)
    one = Cluster(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    del one.environment["CUDA_VISIBLE_DEVICES"]
    assert "nvidia-smi does not tell the GPUs" in one("up", code=2)
    assert one.pids() == {}


def test_unit_files_are_valid_and_hold_no_secret(tmp_path: Path) -> None:
    one = Cluster(
        tmp_path,
        PREFECT_SERVER_API_AUTH_STRING="admin:s3cret",
        PREFECT_SERVER_DATABASE_CONNECTION_URL="postgresql+asyncpg://me:s3cret@host/db",
        PREFECT_CLIENT_CUSTOM_HEADERS='{"X-Token": "s3cret"}',
        PREFECT_API_URL="http://me:s3cret@host/api",
    )
    units = tmp_path / "units"
    units.mkdir()
    said = one("systemd", str(units))
    texts = {file.name: file.read_text() for file in units.iterdir()}
    assert set(texts) == {
        "clozeline-server.service",
        "clozeline-cpu-worker.service",
        "clozeline-gpu-worker@.service",
    }
    assert "s3cret" not in said + "".join(texts.values())
    assert "Environment=CUDA_VISIBLE_DEVICES=%i" in texts["clozeline-gpu-worker@.service"]
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, units.iterdir())],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
