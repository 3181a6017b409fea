"""What a run is expected to cost, and where its stages find what they read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.stages import run_stage
from pipeline.task import Task
from tests.stage_run import Run


def test_a_directory_named_like_a_model_of_the_hub_is_one_for_every_stage(
    tiny_task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tiny_task()
    task = Task.load(path)
    shutil.copytree(task.base().path, path.parent / "models" / "mini@1")
    monkeypatch.chdir(tmp_path)  # not the task's directory
    run = Run(path)
    for call in run.plan("base_model=models/mini@1").calls:
        run_stage(call.request(run.store))
        if call.stage == "fit":
            break
    else:
        raise AssertionError("no stage loaded the model")


def test_without_dropout_a_step_is_expected_to_read_a_labelled_row_once(tiny_task: Callable[..., Path]) -> None:
    run = Run(tiny_task(labelled=6))

    def flops(dropout: float, folds: int) -> float:
        overrides = ["training.batch_size=16", f"training.dropout={dropout}", f"training.folds={folds}"]
        return run.plan(*overrides).find("fit")[0].flops

    assert flops(0.0, 0) == pytest.approx(flops(0.1, 0) * 6 / 16)
    assert flops(0.0, 2) == pytest.approx(flops(0.1, 2) * (6 + 3 + 3) / (3 * 16))


@pytest.mark.parametrize(("labelled", "steps"), [(6, 50), (150, 75)])
def test_steps_are_planned_for_the_labelled_rows_that_there_are(
    labelled: int, steps: int, tiny_task: Callable[..., Path]
) -> None:
    run = Run(tiny_task(labelled=labelled))
    fits = run.plan("training.steps=auto", "training.batch_size=16").find("fit")
    assert {fit.spec["steps"] for fit in fits} == {steps}


def test_without_labelled_rows_only_later_generations_are_planned_to_train(tiny_task: Callable[..., Path]) -> None:
    run = Run(tiny_task())
    plan = run.plan("training.steps=auto", "inputs.labelled=null", "inputs.test=null", "ipet.generations=1")
    assert {(fit.generation, fit.spec["steps"]) for fit in plan.find("fit")} == {(0, 0), (1, 50)}
