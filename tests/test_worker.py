"""The process that runs stages: what ends it, what it waits for, and what its holder learns of it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.base_model import resolve_base_model
from pipeline.device import hold_device
from pipeline.errors import InputError, OutOfMemory, RunStopped, StageHung, StageLost
from pipeline.plan import build_plan
from pipeline.stages import run_stage
from pipeline.store import Store, open_store
from pipeline.task import Task
from pipeline.worker import StageProcess

MakeTask = Callable[..., Path]
Request = dict[str, Any]


@pytest.fixture
def request_of_fit(tiny_task: MakeTask, tmp_path: Path) -> Callable[..., Request]:
    """A request for the fit of the first annotator, its inputs being in the store."""

    def make(*overrides: str, store: str = "store") -> Request:
        task = Task.load(tmp_path / "task" / "task.yaml" if (tmp_path / "task").exists() else tiny_task(), overrides)
        plan, where = build_plan(task, resolve_base_model(task.base_model, task.root)), Store(tmp_path / store)
        for call in plan.calls:
            request = {**call.request(where), "on_device": call.on_device}
            if call.stage == "fit":
                return request
            run_stage(request)
        raise AssertionError

    return make


@pytest.fixture
def process() -> Iterator[StageProcess]:
    with StageProcess() as running:
        yield running


def long_fit(request_of_fit: Callable[..., Request]) -> Request:
    return request_of_fit("training.steps=100000", "training.folds=0")


class Background:
    """A request that runs in a thread, from its first progress on."""

    def __init__(self, process: StageProcess, request: Request) -> None:
        self.error: BaseException | None = None
        self.result: Any = None
        begun = threading.Event()

        def work() -> None:
            try:
                self.result = process.run(request, lambda done, total: begun.set())
            except BaseException as error:  # the test looks at it
                self.error = error
            begun.set()

        self.thread = threading.Thread(target=work)
        self.thread.start()
        assert begun.wait(60)

    def join(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()


def test_stage_is_built_once_and_reports_its_progress(process: StageProcess, request_of_fit: Any) -> None:
    told: list[tuple[int, int]] = []
    request = request_of_fit()
    first = process.run(request, lambda done, total: told.append((done, total)))
    assert first["built"]
    assert told[0] == (0, 1)  # when the work begins
    assert told[-1][0] == told[-1][1] > 1
    assert process.run(request, lambda done, total: None) == {**first, "built": False}


def test_user_error_leaves_the_process_at_work(process: StageProcess, request_of_fit: Any) -> None:
    request = request_of_fit()
    wrong = {**request, "key": "0" * 32, "spec": {**request["spec"], "base": "another model"}}
    with pytest.raises(InputError, match="not the one that the run was planned with"):
        process.run(wrong, lambda done, total: None)
    assert process.run(request, lambda done, total: None)["built"]


def test_stage_that_hangs_is_killed(request_of_fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOZELINE_STAGE_TIMEOUT", "4")
    with StageProcess() as process:
        running = Background(process, long_fit(request_of_fit))
        os.kill(process.pid, signal.SIGSTOP)
        running.join()
        assert isinstance(running.error, StageHung)
        assert "made no progress for 4 s" in str(running.error)
        assert not process.alive


def test_stage_that_waits_for_a_device_is_not_taken_for_hung_while_it_lives(
    request_of_fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOZELINE_STAGE_TIMEOUT", "4")  # its start, imports and all, must fit into it
    monkeypatch.setenv("CLOZELINE_DEVICE", f"held-{os.getpid()}")
    request = request_of_fit()
    with StageProcess() as process, hold_device():
        ended = threading.Event()
        errors: list[BaseException] = []

        def work() -> None:
            try:
                process.run(request, lambda done, total: None)
            except BaseException as error:
                errors.append(error)
            ended.set()

        threading.Thread(target=work).start()
        assert not ended.wait(10)
        os.kill(process.pid, signal.SIGSTOP)
        assert ended.wait(10)
    assert type(errors[0]) is StageHung


def test_stage_whose_upload_takes_long_is_not_taken_for_hung(
    tiny_task: MakeTask, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import s3_server

    monkeypatch.setenv("CLOZELINE_STAGE_TIMEOUT", "4")
    task = Task.load(tiny_task())
    request = build_plan(task, task.base()).calls[0].request(open_store(s3_url))
    quick, waited = s3_server._OneConditionalWrite.__call__, list[str]()

    def slow(app: Any, environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith("rows.parquet"):
            waited.append(environ["PATH_INFO"])
            time.sleep(6)
        return quick(app, environ, start_response)

    monkeypatch.setattr(s3_server._OneConditionalWrite, "__call__", slow)
    with StageProcess() as process:
        assert process.run(request, lambda done, total: None)["built"]
    assert len(waited) == 1


def test_killed_process_is_a_lost_stage_and_a_stopped_one_is_not(process: StageProcess, request_of_fit: Any) -> None:
    request = long_fit(request_of_fit)
    running = Background(process, request)
    os.kill(process.pid, signal.SIGKILL)
    running.join()
    assert type(running.error) is StageLost
    assert "exit status -9" in str(running.error)
    with StageProcess() as other:
        running = Background(other, request)
        other.stop()
        running.join()
    assert isinstance(running.error, RunStopped)


def lengthen(file: Path) -> None:
    """Make the texts of a file as long as the model reads."""
    rows = pq.read_table(file).to_pylist()
    pq.write_table(pa.Table.from_pylist([{**row, "text": row["text"] + " good bad" * 40} for row in rows]), file)


def data_megabytes(pid: int) -> int:
    """What a process holds of the memory that `CLOZELINE_STAGE_MEMORY` bounds; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmData"))


@pytest.mark.server
def test_stage_out_of_memory_is_told_and_fits_with_smaller_batches(
    request_of_fit: Any, tiny_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengthen(tiny_task().parent / "labelled.parquet")
    # With dropout, since without it a row is read once a step however often it is drawn.
    settings = {"batch_size": 1024, "steps": 1, "folds": 0, "max_length": 64, "dropout": 0.1}
    overrides = [f"training.{key}={value}" for key, value in settings.items()]
    request = request_of_fit(*overrides)
    with StageProcess() as free:
        free.run({**request, "batch_share": 1 / 512}, lambda done, total: None)
        taken = data_megabytes(free.pid)
    # What it took in pieces of two rows, and a third of what 1,024 rows at once were seen to take beyond that.
    monkeypatch.setenv("CLOZELINE_STAGE_MEMORY", str(taken + 50))
    request = request_of_fit(*overrides, store="bounded")
    with StageProcess() as bounded, pytest.raises(OutOfMemory):
        bounded.run(request, lambda done, total: None)
    assert not bounded.alive
    with StageProcess() as bounded:
        assert bounded.run({**request, "batch_share": 1 / 64}, lambda done, total: None)["built"]
    record = json.loads((Path(request["store"]) / "fit" / request["key"] / "run.json").read_text())
    assert record["batch_share"] == 1 / 64


PARENT = textwrap.dedent("""\
    import json, sys
    from pipeline.worker import StageProcess

    with StageProcess() as process:
        request = json.loads(sys.argv[1])
        process.run(request, lambda done, total: print(process.pid, flush=True))
    """)


@pytest.mark.parametrize("stopped", [False, True])
def test_process_dies_with_its_parent_whatever_it_is_doing(stopped: bool, request_of_fit: Any) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(long_fit(request_of_fit))], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    if stopped:
        child.suspend()
    parent.kill()
    parent.communicate()
    child.wait(5)
    assert not child.is_running()


def test_two_processes_of_one_device_take_turns(request_of_fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOZELINE_DEVICE", f"test-{os.getpid()}")
    requests = [request_of_fit(f"annotators.0.pattern={{mask}} {{text}} {i}") for i in range(3)]
    with StageProcess() as one, StageProcess() as two, StageProcess() as three:
        running = [Background(process, r) for process, r in zip((one, two, three), requests, strict=True)]
        for each in running:
            each.join()
            assert each.error is None
    spans = []
    for request in requests:
        record = json.loads((Path(request["store"]) / "fit" / request["key"] / "run.json").read_text())
        spans.append((record["started"], record["started"] + record["seconds"]))
        assert record["device"] == f"test-{os.getpid()}"
    spans.sort()
    assert all(ended <= started + 0.01 for (_, ended), (started, _) in itertools.pairwise(spans))


def test_run_planned_for_another_kind_of_device_is_refused(process: StageProcess, request_of_fit: Any) -> None:
    request = request_of_fit()
    elsewhere = {
        **request,
        "key": "1" * 32,
        "spec": {**request["spec"], "profile": {"device": "cuda", "dtype": "bfloat16", "torch": "2.13"}},
    }
    with pytest.raises(InputError, match="CLOZELINE_STAGE_DEVICE"):
        process.run(elsewhere, lambda done, total: None)
