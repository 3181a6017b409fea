"""The pool engine on a real server with real workers: who runs what, and what happens when they are killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.base_model import resolve_base_model
from pipeline.plan import build_plan
from pipeline.publishing import publish
from pipeline.store import Store
from pipeline.task import Task
from pipeline.worker import StageProcess
from tests.server.cluster import Cluster, marked, wait_until

pytestmark = pytest.mark.server
MakeTask = Callable[..., Path]
PATTERNS = [
    "{text} It was {mask}.",
    "{mask}: {text}",
    "All in all, it was {mask}. {text}",
    "Just {mask}! {text}",
    "{text} In short: {mask}.",
    "({mask}) {text}",
    "A {mask} one. {text}",
    "{text} {mask}",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One server, one cpu worker and two workers that stand for GPUs, for all tests of this file."""
    home = tmp_path_factory.mktemp("home")
    one = Cluster(home, CLOZELINE_SILENCE="75")
    try:
        one("up")
        yield one
    finally:
        one("down")
    assert marked(home) == []


class Job:
    """A task, what an undisturbed run of it leaves, and runs of it on the cluster."""

    def __init__(self, cluster: Cluster, path: Path, calm: dict[str, bytes]) -> None:
        self.cluster, self.path, self.calm = cluster, path, calm
        self.home = cluster.state.parent.parent
        self.store = self.home / ".clozeline" / "store"

    def fresh(self) -> None:
        """Forget what was computed and released."""
        for directory in (self.store, self.home / "releases"):
            shutil.rmtree(directory, ignore_errors=True)

    def start(self, deployment: str = "label/default", **parameters: Any) -> str:
        """Start a run as a user does; gives its id."""
        given = [f"--param={name}={value}" for name, value in {"task": self.path, **parameters}.items()]
        said = self.cluster.prefect("deployment", "run", deployment, *given)
        return next(word for word in said.split() if len(word) == 36 and word.count("-") == 4)

    def state(self, run: str) -> str:
        return str(self.cluster.ask(f"/flow_runs/{run}")["state"]["type"])

    def wait(self, run: str, seconds: float = 300) -> None:
        """Wait for its good end."""
        wait_until(lambda: self.state(run) in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}, seconds)
        assert self.state(run) == "COMPLETED", self.cluster.ask(f"/flow_runs/{run}")["state"]

    def wait_for_fits(self, count: int = 1, seconds: float = 180) -> None:
        """Wait until so many fits are being built at once."""
        wait_until(lambda: len(list((self.store / "tmp").glob("fit-*"))) >= count, seconds)

    def bytes(self) -> dict[str, bytes]:
        return bytes_of(self.home / "releases" / "tiny")

    def records(self) -> list[dict[str, Any]]:
        """When, where and how long each stage with a model ran."""
        found = [json.loads(file.read_text()) for file in self.store.glob("*/*/run.json")]
        return [record for record in found if "device" in record]

    def assert_whole(self) -> None:
        """The release is that of an undisturbed run, and nothing was left behind."""
        assert self.bytes() == self.calm
        assert len(list((self.home / "releases" / "tiny" / "versions").iterdir())) == 1
        wait_until(lambda: not self.stage_processes(), 20)
        assert not list((self.store / "tmp").iterdir())

    def stage_processes(self) -> list[int]:
        return [pid for pid in marked(self.home) if "pipeline.worker" in command_of(pid)]


def command_of(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""


def bytes_of(release: Path) -> dict[str, bytes]:
    version = release / "versions" / (release / "LATEST").read_text().strip()
    files = [*version.glob("data/*"), *version.glob("model/*.safetensors"), version / "manifest.json"]
    return {str(file.relative_to(version)): file.read_bytes() for file in sorted(files)} | {"": version.name.encode()}


@pytest.fixture
def job(cluster: Cluster, tiny_task: MakeTask, tmp_path: Path, request: pytest.FixtureRequest) -> Job:
    """Two annotators of 60 steps, or what the test asks for; the undisturbed run is made with no Prefect at all."""
    annotators, steps = getattr(request, "param", (2, 60))
    changes = {
        "annotators": PATTERNS[:annotators],
        "inputs": {"test": None},
        "training": {"steps": steps, "folds": 0},
        "student": {"steps": 20},
    }
    path = tiny_task(changes=changes)
    task, store = Task.load(path), Store(tmp_path / "calm")
    plan = build_plan(task, resolve_base_model(task.base_model, task.root))
    with StageProcess() as process:
        for call in plan.calls:
            process.run({**call.request(store), "on_device": call.on_device}, lambda done, total: None)
    artifact = store.find(plan.release.stage, plan.release.key)
    assert artifact is not None
    publish(artifact, tmp_path / "calm-release")
    made = Job(cluster, path, bytes_of(tmp_path / "calm-release"))
    made.fresh()
    return made


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
        wait_until(lambda: bool(found.extend(stage_side(job, sign)) or found), 60)
        os.kill(draw.choice(found), signal.SIGKILL)
    job.wait(run)
    job.assert_whole()


def stage_side(job: Job, sign: str) -> list[int]:
    """Processes on the side of the gpu workers whose command holds a word."""
    found = []
    for pid in marked(job.home):
        try:
            member = psutil.Process(pid).environ().get("CLOZELINE_CLUSTER_MEMBER", "")
            if ":gpu-" in member and sign in command_of(pid):
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def test_server_that_is_killed_and_comes_back_finds_the_run_going_on(job: Job) -> None:
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
    wait_until(lambda: not stage_side(job, "pipeline.worker"), 60)
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
