"""New data is told to a real Prefect server, by command, by watch and by schedule."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.locations import masked
from tests.prefect_server import prefect_server

ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "user:secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server with a password and CSRF protection; the variables of a client that knows them."""
    variables = {
        "PREFECT_API_AUTH_STRING": PASSWORD,
        "PREFECT_SERVER_API_AUTH_STRING": PASSWORD,
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "0.2",
    }
    with prefect_server(tmp_path_factory.mktemp("prefect"), **variables) as environment:
        yield environment


@pytest.fixture
def client(server: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The variables of a client with a home of its own."""
    return {**server, "CLOZELINE_HOME": str(tmp_path / "home")}


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task with one file of three rows to label."""
    folder = tmp_path / "mail"
    land(folder / "in" / "a.parquet", 3)
    path = folder / "task.yaml"
    path.write_text(
        'labels: {good: good, bad: bad}\ninputs: {unlabelled: in/*.parquet}\nannotators: ["{text} It was {mask}."]\n'
    )
    return path


def land(file: Path, rows: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(rows)]}), file)


def clozeline(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@contextlib.contextmanager
def watching(environment: dict[str, str], task: Path) -> Iterator[Any]:
    command = [sys.executable, "-m", "flows.cli", "watch", str(task), "--every", "0.2"]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores interrupts, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(server: dict[str, str], path: str, question: dict[str, Any]) -> Any:
    """POST to the API as a client that knows the password."""
    with httpx.Client(base_url=server["PREFECT_API_URL"], auth=tuple(PASSWORD.split(":"))) as http:
        token = http.get("/csrf-token", params={"client": "test"}).json()["token"]
        headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}
        return http.post(path, json=question, headers=headers).raise_for_status().json()


def announced(server: dict[str, str], task: Path, *, count: int) -> list[dict[str, Any]]:
    """The events about a task, waited for: the server writes them to its database somewhat later."""
    until = time.monotonic() + 20
    while True:
        found = ask(server, "/events/filter", {"filter": {"event": {"name": ["clozeline.data.landed"]}}})["events"]
        mine = [event for event in found if event["payload"]["task"] == str(task)]
        if len(mine) >= count or time.monotonic() > until:
            return mine
        time.sleep(0.2)


@pytest.mark.prefect
def test_notify_starts_a_run_of_the_deployment_that_the_event_triggers(client: dict[str, str], task: Path) -> None:
    # As `prefect deploy` makes it, without the worker that would run it.
    script = """
import yaml
from prefect.events import DeploymentEventTrigger
from flows.label import label
[found] = [found for found in yaml.safe_load(open("prefect.yaml"))["deployments"] if found["name"] == "on-new-data"]
triggers = [DeploymentEventTrigger.model_validate(trigger) for trigger in found["triggers"]]
label.to_deployment(name=found["name"], parameters=found["parameters"], triggers=triggers).apply()
"""
    subprocess.run([sys.executable, "-c", script], env=client, cwd=ROOT, check=True, capture_output=True, timeout=60)
    done = clozeline(client, "notify", os.path.relpath(task), "--json")
    assert done.returncode == 0, done.stderr
    payload = {"task": str(task), "files": 1, "rows": 3}
    assert json.loads(done.stdout) == {"event": "clozeline.data.landed", "payload": payload}
    until = time.monotonic() + 20
    while not (runs := ask(client, "/flow_runs/filter", {})) and time.monotonic() < until:
        time.sleep(0.2)
    assert [run["parameters"]["task"] for run in runs] == [str(task)]
    [event] = announced(client, task, count=1)
    assert event["payload"] == payload
    assert event["resource"]["prefect.resource.id"] == "clozeline.task.mail"


@pytest.mark.prefect
def test_notify_without_counts_opens_no_file(client: dict[str, str], task: Path) -> None:
    (task.parent / "in" / "a.parquet").write_bytes(b"no Parquet")
    refused = clozeline(client, "notify", str(task))
    assert refused.returncode == 2
    assert "a.parquet" in refused.stderr
    assert clozeline(client, "notify", str(task), "--no-counts").returncode == 0
    [event] = announced(client, task, count=1)
    assert event["payload"] == {"task": str(task)}


@pytest.mark.prefect
def test_a_wrong_password_is_the_users_to_correct(client: dict[str, str], task: Path) -> None:
    done = clozeline({**client, "PREFECT_API_AUTH_STRING": "user:wrong"}, "notify", str(task))
    assert done.returncode == 2
    assert "PREFECT_API_AUTH_STRING" in done.stderr
    assert "wrong" not in done.stderr


@pytest.mark.prefect
def test_an_address_without_an_api_is_the_users_to_correct(client: dict[str, str], task: Path) -> None:
    address = client["PREFECT_API_URL"].removesuffix("/api")
    done = clozeline({**client, "PREFECT_API_URL": address}, "notify", str(task))
    assert done.returncode == 2
    assert "ends in /api" in done.stderr


@pytest.mark.prefect
def test_watch_announces_what_lands_and_survives_a_broken_task(client: dict[str, str], task: Path) -> None:
    written = task.read_text()
    with watching(client, task) as process:
        assert "3 rows in 1 files" in process.stdout.readline()
        task.write_text("labels: {good")
        assert "warning" in process.stderr.readline()
        land(task.parent / "in" / "b.parquet", 4)
        task.write_text(written)
        line = process.stdout.readline()
        assert "7 rows in 2 files" in line
        assert "b.parquet" in line
        assert "a.parquet" not in line
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert sorted(event["payload"]["rows"] for event in announced(client, task, count=2)) == [3, 7]


@pytest.mark.prefect
def test_watch_goes_on_while_the_server_is_away_and_then_announces(client: dict[str, str], task: Path) -> None:
    server = httpx.URL(client["PREFECT_API_URL"])

    class Forward(socketserver.BaseRequestHandler):
        """One connection, passed on to the server."""

        def handle(self) -> None:
            with socket.create_connection((server.host, server.port)) as onward:
                threading.Thread(target=self.pump, args=(onward, self.request), daemon=True).start()
                self.pump(self.request, onward)

        @staticmethod
        def pump(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

    way = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Forward, bind_and_activate=False)
    way.daemon_threads = True
    way.server_bind()  # has its port, yet refuses connections until it listens
    with watching(client | {"PREFECT_API_URL": f"http://127.0.0.1:{way.server_address[1]}/api"}, task) as process:
        assert "does not answer" in process.stderr.readline()
        way.server_activate()
        threading.Thread(target=way.serve_forever, daemon=True).start()
        assert "well again" in process.stderr.readline()
        assert "3 rows in 1 files" in process.stdout.readline()
    way.shutdown()
    way.server_close()
    [event] = announced(client, task, count=1)
    assert event["payload"]["rows"] == 3


@pytest.mark.prefect
def test_the_inbox_flow_announces_at_its_second_pass_and_fails_for_the_task_that_is_wrong(
    client: dict[str, str], task: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    relative = os.path.relpath(task, tmp_path / "home")
    script = """
import json, sys
from flows.inbox import inbox
from pipeline.errors import InputError
print(json.dumps(inbox(sys.argv[1:2])))
try:
    inbox(["missing.yaml", sys.argv[1]])
except InputError as error:
    print(json.dumps(str(error)))
print(json.dumps(inbox(sys.argv[1:2])))
"""
    command = [sys.executable, "-c", script, relative]
    done = subprocess.run(command, env=client, check=True, capture_output=True, text=True, timeout=60)
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert first == third == {}
    assert "missing.yaml" in second
    [event] = announced(client, task, count=1)
    assert event["payload"] == {"task": str(task), "files": 1, "rows": 3}


def test_notify_needs_a_server_that_lasts(task: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    environment["PREFECT_HOME"] = str(tmp_path / "prefect")
    for command in ("notify", "watch"):
        done = clozeline(environment, command, str(task))
        assert done.returncode == 2
        assert "PREFECT_API_URL" in done.stderr


def test_a_wrong_task_is_told_before_the_server_is_asked(tmp_path: Path) -> None:
    done = clozeline({**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"}, "notify", str(tmp_path / "no.yaml"))
    assert done.returncode == 2
    assert "no.yaml" in done.stderr


def test_a_server_that_does_not_answer_is_a_failure_that_names_it_without_its_password(task: Path) -> None:
    address = "http://me:secret@127.0.0.1:9/api"
    done = clozeline({**os.environ, "PREFECT_API_URL": address}, "notify", str(task))
    assert done.returncode == 1
    assert "127.0.0.1:9/api" in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("http://127.0.0.1:4200/api", "http://127.0.0.1:4200/api"),
        ("s3://bucket/store", "s3://bucket/store"),
        ("https://me:secret@host/api", "https://***@host/api"),
        ("https://token@host/api", "https://***@host/api"),
        ("s3://me:se/cr@et@bucket/store", "s3://***@bucket/store"),
        ("/a/path@home", "/a/path@home"),
    ],
)
def test_credentials_in_locations_are_masked(location: str, shown: str) -> None:
    assert masked(location) == shown
