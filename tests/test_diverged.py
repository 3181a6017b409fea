"""An annotator whose training diverges is left out, alone; with fewer than two left the run fails and says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pipeline.errors import InputError
from tests.machine import Machine
from tests.stage_run import Run

MakeTask = Callable[..., Path]
SOUND = ["{text} It was {mask}.", "{mask}: {text}"]
BROKEN = "{text} 7 {mask}."


@pytest.fixture(scope="module")
def broken_seven(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an infinite embedding of "7", which no text holds: what reads a 7 is no number."""
    path = tmp_path_factory.mktemp("models") / "broken-seven"
    shutil.copytree(tiny_model, path)
    weights = load_file(path / "model.safetensors")
    seven = AutoTokenizer.from_pretrained(path).convert_tokens_to_ids("7")
    weights["bert.embeddings.word_embeddings.weight"][seven] = float("inf")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def make(tiny_task: MakeTask, broken_seven: Path) -> Callable[..., Run]:
    """A run with the given patterns and the broken model."""

    def make(patterns: list[str], folder: str = "task") -> Run:
        changes = {"annotators": patterns, "base_model": str(broken_seven), "training": {"freeze_embeddings": True}}
        return Run(tiny_task(folder, changes))

    return make


def test_annotator_that_diverges_is_left_out_and_the_rest_is_as_if_it_were_not_there(
    make: Callable[..., Run],
) -> None:
    run, without = make([SOUND[0], BROKEN, SOUND[1]]), make(SOUND, "without")
    run()
    without()
    for split in ("review", "rest"):
        for row, other in zip(run.rows(split), without.rows(split), strict=True):
            assert row["probs"] == other["probs"]
            names = [vote["annotator"] for vote in row["votes"] or []]
            assert names == (["p0", "p2"] if row["votes"] else [])
    assert run.summary["weights"]["p1"] == 0
    assert np.isclose(sum(run.summary["weights"].values()), 1, atol=1e-5)
    metrics = json.loads((run.version / "metrics.json").read_text())
    assert set(metrics["test"]["annotators"]) == {"p0", "p2"}
    assert set(metrics["cross_validation"]) == {"p0", "p2", "weighted"}


def test_release_says_who_was_left_out_and_why(make: Callable[..., Run]) -> None:
    run = make([SOUND[0], BROKEN, SOUND[1]])
    run()
    why = {"p1": "the base model's own scores of this pattern are no numbers"}
    assert run.summary["diverged"] == why
    assert json.loads((run.version / "metrics.json").read_text())["summary"]["diverged"] == why
    assert json.loads((run.version / "manifest.json").read_text())["diverged"] == why
    told = f"p1 was left out, since its training diverged: {why['p1']}."
    assert told in (run.version / "README.md").read_text()
    assert told.replace("'", "&#x27;") in (run.version / "report.html").read_text()


def test_sound_run_says_nothing_of_it(make: Callable[..., Run]) -> None:
    run = make(SOUND)
    run()
    for name in ("metrics.json", "manifest.json", "README.md", "report.html"):
        assert "diverged" not in (run.version / name).read_text()


def test_diverged_fit_is_cached(make: Callable[..., Run]) -> None:
    run = make([SOUND[0], BROKEN, SOUND[1]])
    run()
    assert run() == []


def test_too_few_annotators_left_is_the_users_to_fix(make: Callable[..., Run]) -> None:
    with pytest.raises(InputError, match=r"fewer than two annotators are left \(p1: .*no numbers\)") as caught:
        make([SOUND[0], BROKEN])()
    assert "lower training.learning_rate (it is " in str(caught.value)
    with pytest.raises(InputError, match=r"are left \(p0: "):
        make([BROKEN], "alone")()


def test_loss_that_is_no_number_is_told_with_its_step(make: Callable[..., Run]) -> None:
    run = make(SOUND)
    with pytest.raises(InputError, match=r"\(p0: the loss became nan at step 1 of 2; p1: the loss became nan"):
        run("training.mlm_alpha=0.5")  # the MLM loss reads the whole vocabulary, the 7 too


def test_only_annotator_of_a_task_needs_no_other(make: Callable[..., Run]) -> None:
    run = make(SOUND[:1])
    run()
    assert run.summary["weights"] == {"p0": 1}


def test_without_labelled_rows_a_broken_pattern_is_left_out_too(make: Callable[..., Run]) -> None:
    run = make([SOUND[0], BROKEN, SOUND[1]])
    run("inputs.labelled=null")
    assert set(run.summary["diverged"]) == {"p1"}


def test_student_that_diverges_fails_with_its_step_and_the_setting(make: Callable[..., Run]) -> None:
    with pytest.raises(InputError, match="the student's training diverged: the loss became nan at step 1 of 2") as told:
        make(SOUND)("student.template={text} 7")
    assert "lower student.learning_rate (it is 0.0001)" in str(told.value)


@pytest.mark.prefect
def test_command_warns_of_who_was_left_out_and_fails_with_2_when_too_few_are_left(
    make: Callable[..., Run], machine: Machine
) -> None:
    path = str(make([SOUND[0], BROKEN, SOUND[1]]).path)
    warnings = machine.summary(path)["warnings"]
    assert [text for text in warnings if text.startswith("the annotator p1 was left out, since its training diverged")]
    code, _, told = machine.clozeline("run", path, "--set", f'annotators=["{SOUND[0]}", "{BROKEN}"]')
    assert code == 2
    assert "fewer than two annotators are left (p1: " in told
    assert "Traceback" not in told
