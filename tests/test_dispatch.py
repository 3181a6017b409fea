"""What is sent together, what is tried again, and how: the dispatcher with a real plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.dispatch import Dispatcher, grouped
from pipeline.base_model import resolve_base_model
from pipeline.errors import InputError, OutOfMemory, StageFailed, StageLost, StorageTrouble, rebuilt
from pipeline.plan import Plan, build_plan
from pipeline.store import Store
from pipeline.task import Task

MakeTask = Callable[..., Path]


@pytest.fixture
def plan(tiny_task: MakeTask) -> Plan:
    """Two annotators and thirty small files."""
    path = tiny_task(changes={"inputs": {"unlabelled": "part-*.parquet", "id": None}})
    for i in range(30):
        pq.write_table(
            pa.table({"text": [f"the tea was good {i}"], "shop": ["north"]}), path.parent / f"part-{i}.parquet"
        )
    task = Task.load(path)
    return build_plan(task, resolve_base_model(task.base_model, task.root))


@pytest.mark.parametrize("far", [False, True])
def test_scoring_by_a_generation_is_sent_after_the_one_before(tiny_task: MakeTask, far: bool) -> None:
    task = Task.load(tiny_task(changes={"ipet": {"generations": 2}}))
    plan = build_plan(task, resolve_base_model(task.base_model, task.root))
    sent: set[str] = set()
    for group in grouped(plan, {call.key for call in plan.calls}, far=far):
        assert {needed.key for call in group for needed in call.inputs.values()} <= sent
        sent |= {call.key for call in group}


@pytest.mark.parametrize("far", [False, True])
def test_each_call_is_sent_once_and_after_what_it_needs(plan: Plan, far: bool) -> None:
    sent: set[str] = set()
    for group in grouped(plan, {call.key for call in plan.calls}, far=far):
        keys = {call.key for call in group}
        assert {needed.key for call in group for needed in call.inputs.values()} <= sent
        assert not keys & sent
        assert len({call.stage for call in group}) == 1
        sent |= keys
    assert sent == {call.key for call in plan.calls}


def test_small_files_share_task_runs_and_scoring_shares_them_far_away(plan: Plan) -> None:
    missing = {call.key for call in plan.calls}

    def sizes(stage: str, far: bool) -> list[int]:
        return [len(group) for group in grouped(plan, missing, far=far) if group[0].stage == stage]

    assert len(sizes("ingest", False)) == 8
    assert sum(sizes("label", True)) == 31
    assert len(sizes("label", True)) == 2
    assert sizes("fit", True) == [1, 1]
    assert sizes("annotate", False) == [1] * 6


def test_what_the_store_has_is_not_mixed_with_what_is_missing(plan: Plan) -> None:
    label = [call.key for call in plan.calls if call.stage == "label"]
    groups = grouped(plan, set(label[:3]), far=True)
    for group in groups:
        assert len({call.key in set(label[:3]) for call in group}) == 1


class Failing:
    """An engine that keeps what it is sent, and fails."""

    def __init__(self, error: Exception) -> None:
        self.error, self.shares = error, list[float]()

    def run(self, title: str, requests: Sequence[Any], progress: Any) -> list[dict[str, Any]]:
        self.shares += [request["batch_share"] for request in requests]
        raise self.error

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "shares"),
    [
        (OutOfMemory("no memory"), [1.0, 0.5, 0.25, 0.125]),
        (StageLost("killed"), [1.0, 1.0, 1.0, 1.0]),  # half batches would change the last bits
        (StorageTrouble("slow down"), [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_batches_are_halved_after_running_out_of_memory_alone(
    plan: Plan, tmp_path: Path, error: Exception, shares: list[float]
) -> None:
    dispatcher = Dispatcher("local", Store(tmp_path / "store"), "ad-hoc")
    failing = Failing(error)
    dispatcher._far = dispatcher._beside = failing  # type: ignore[assignment]
    [fit, *_] = plan.find("fit")
    for _ in shares:
        with pytest.raises(type(error)):
            dispatcher.run("fit", [{**fit.request(dispatcher.store), "on_device": True}], lambda done, total: None)
    assert failing.shares == shares


@pytest.mark.parametrize("kind", [InputError, StageFailed, StageLost, OutOfMemory, StorageTrouble])
def test_errors_keep_their_kind_and_text_on_their_way_through_other_machines(kind: type[Exception]) -> None:
    error = kind("what went wrong\n  fix: mend it")
    again = rebuilt(type(error).__name__, str(error))
    assert (type(again), str(again)) == (kind, str(error))


def test_error_of_an_unknown_kind_is_a_failed_stage() -> None:
    assert type(rebuilt("KeyError", "text")) is StageFailed
