"""prefect.yaml, and the deployment on a real server with a real worker."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.prefect_server import prefect_server

ROOT = Path(__file__).resolve().parent.parent
KNOWN = {
    "": {"name", "prefect-version", "build", "push", "pull", "deployments"},
    "deployment": {
        "name", "version", "tags", "description", "schedules", "paused", "concurrency_limit", "entrypoint",
        "parameters", "enforce_parameter_schema", "work_pool", "triggers",
    },
    "schedule": {"slug", "cron", "timezone", "active", "parameters", "interval", "rrule", "anchor_date", "day_or"},
    "work_pool": {"name", "work_queue_name", "job_variables"},
    "trigger": {"type", "enabled", "match", "expect", "parameters"},
}  # fmt: skip


def test_prefect_yaml_has_only_known_keys_and_importable_flows_with_valid_parameters() -> None:
    document: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    assert set(document) <= KNOWN[""]  # Prefect ignores unknown keys without a word
    assert document["pull"] == []
    names = set()
    for deployment in document["deployments"]:
        assert set(deployment) <= KNOWN["deployment"]
        assert set(deployment["work_pool"]) <= KNOWN["work_pool"]
        module, name = deployment["entrypoint"].rsplit(".", 1)
        flow = getattr(importlib.import_module(module), name)
        names.add(f"{flow.name}/{deployment['name']}")
        assert set(deployment["parameters"]) <= set(flow.parameters.properties)
        for schedule in deployment.get("schedules", []):
            assert set(schedule) <= KNOWN["schedule"]
            assert schedule["active"] is False
            flow.validate_parameters({**deployment["parameters"], **schedule["parameters"]})
        for trigger in deployment.get("triggers", []):
            assert set(trigger) <= KNOWN["trigger"]
            flow.validate_parameters({**deployment["parameters"], **trigger["parameters"]})
    assert names == {"label/default", "label/nightly", "label/on-new-data", "inbox/watch", "stage/gpu"}


@pytest.mark.parametrize("wrong", [{"engine": "gpu"}, {"priority": "high"}, {"tasks": "x"}, {"overrides": 3}])
def test_wrong_parameters_of_a_run_are_refused(wrong: dict[str, Any]) -> None:
    from prefect.exceptions import ParameterTypeError, SignatureMismatchError

    from flows.label import label

    with pytest.raises((ParameterTypeError, SignatureMismatchError)):
        label.validate_parameters({"task": "task.yaml", **wrong})


def test_every_parameter_is_shown_with_a_title_and_a_description_in_its_order() -> None:
    from flows.inbox import inbox
    from flows.label import label
    from flows.stage import stage

    shown = {**stage.parameters.properties, **inbox.parameters.properties, **label.parameters.properties}
    assert all(found["title"] != name and found["description"] for name, found in shown.items())
    assert min(label.parameters.properties, key=lambda name: shown[name]["position"]) == "task"
    assert shown["engine"]["enum"] == ["local", "pool", "ray", "dask"]
    assert label.parameters.required == ["task"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, str]]:
    variables = {"PREFECT_WORKER_QUERY_SECONDS": "1", "CLOZELINE_HOME": str(tmp_path / "home")}
    with prefect_server(tmp_path / "prefect", **variables) as environment:
        yield environment


@pytest.mark.server
@pytest.mark.prefect
def test_deployment_run_on_a_process_pool_publishes_a_release(
    server: dict[str, str], tiny_task: Callable[..., Path], tmp_path: Path
) -> None:
    def prefect(*arguments: str, **options: Any) -> str:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, env=server, capture_output=True, text=True, timeout=200, check=False, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    configure = [sys.executable, str(ROOT / "deploy" / "configure.py"), "--gpus", "1"]
    subprocess.run(configure, env=server, check=True, capture_output=True, timeout=200)
    elsewhere = tmp_path / "elsewhere"  # the worker's directory is not the project's
    elsewhere.mkdir()
    worker = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "cpu", "--name", "test"],
        env=server,
        cwd=elsewhere,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        path = tiny_task()
        (tmp_path / "home").mkdir(exist_ok=True)
        relative = os.path.relpath(path, tmp_path / "home")  # as a deployment's parameter: from CLOZELINE_HOME
        prefect(
            "deployment", "run", "label/default", "--param", f"task={relative}", "--param", "engine=local",
            "--watch", "--watch-timeout", "180",
        )  # fmt: skip
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    release = tmp_path / "home" / "releases" / "tiny"
    version = release / "versions" / (release / "LATEST").read_text().strip()
    assert (version / "_SUCCESS").is_file()
    assert json.loads((version / "manifest.json").read_text())["rows"] == {"review": 5, "rest": 19, "train": 8}
    api = server["PREFECT_API_URL"]
    runs = httpx.post(f"{api}/flow_runs/filter", json={}).json()
    assert [run["state_name"] for run in runs] == ["Completed"]
    tasks = {run["name"] for run in httpx.post(f"{api}/task_runs/filter", json={}).json()}
    assert {"fit p0", "annotate p1 on transfer", "blend", "distill", "release"} <= tasks
    artifacts = {found["key"] for found in httpx.post(f"{api}/artifacts/filter", json={}).json()}
    assert {"tiny-label-shares", "tiny-annotators", "tiny-release", "tiny-link"} <= artifacts
