"""A cluster for each file of this folder, and a task to run on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
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

    def stage_side(self, sign: str) -> list[int]:
        """Processes on the side of the gpu workers whose command holds a word."""
        found = []
        for pid in marked(self.home):
            try:
                member = psutil.Process(pid).environ().get("CLOZELINE_CLUSTER_MEMBER", "")
                if ":gpu-" in member and sign in command_of(pid):
                    found.append(pid)
            except psutil.NoSuchProcess:
                continue
        return found


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
