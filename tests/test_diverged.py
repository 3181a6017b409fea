"""An annotator that diverges, in training or in its scores, is left out, alone; with fewer than two left runs fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from flows.cli_console import show_summary
from pipeline.annotators import Texts
from pipeline.annotators.pet import PetAnnotator
from pipeline.errors import InputError
from pipeline.metrics import METHODS
from pipeline.predict import predict_file
from pipeline.progress import Progress
from pipeline.stages import run_stage
from pipeline.store import sha256_of
from pipeline.student import Student
from pipeline.tables import Floats
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


# ---- scores that are no numbers ------------------------------------------------------------------------

THREE = [*SOUND, "{text} All in all it was {mask}."]
ROWS = {"transfer": 24, "queue": 8, "test": 10}  # so that a set shows in its number of rows


@pytest.fixture
def run(tiny_task: MakeTask) -> Run:
    """A run with three sound annotators."""
    return Run(tiny_task(changes={"annotators": THREE, "release": {"review_budget": ROWS["queue"] // 2}}))


@pytest.fixture
def break_scores(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let some patterns' scores of one of the sets hold a NaN and an infinity."""
    real = PetAnnotator.log_probabilities

    def break_them(of: str, *patterns: str) -> None:
        def log_probabilities(self: PetAnnotator, texts: Texts, progress: Progress | None = None) -> Floats:
            scores = real(self, texts, progress)
            if self.spec["pattern"] in patterns and len(scores) == ROWS[of]:
                scores[3] = [np.nan, -np.inf]
            return scores

        monkeypatch.setattr(PetAnnotator, "log_probabilities", log_probabilities)

    return break_them


def voters(run: Run) -> set[tuple[str, ...]]:
    return {tuple(vote["annotator"] for vote in row["votes"]) for row in run.rows("review")}


def metrics_of(run: Run) -> Any:
    return json.loads((run.version / "metrics.json").read_text())


def test_student_whose_scores_are_no_numbers_labels_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run()
    real = Student.log_probabilities

    def log_probabilities(self: Student, texts: Texts, progress: Progress | None = None) -> Floats:
        scores = real(self, texts, progress)
        scores[3:5] = np.nan
        return scores

    monkeypatch.setattr(Student, "log_probabilities", log_probabilities)
    [source] = run.path.parent.glob("unlabelled*.parquet")
    told = "the student's scores of 2 of .* rows are no numbers"
    with pytest.raises(InputError, match=told):
        predict_file(run.version, source, tmp_path / "out.parquet")
    assert not list(tmp_path.glob("*out*"))
    for call in run.plan().find("label"):
        run.store.discard(call.stage, call.key)
    with pytest.raises(InputError, match=told) as error:
        run()
    assert "lower student.learning_rate" in str(error.value)


def test_annotator_whose_weights_are_no_numbers_leaves_no_scores_and_is_left_out(run: Run) -> None:
    plan = run.plan()
    [fit] = [call for call in plan.find("fit") if call.label == "p1"]
    for call in plan.calls[: plan.calls.index(fit) + 1]:
        run_stage(call.request(run.store))
    artifact = run.store.find(fit.stage, fit.key)
    assert artifact is not None
    file = artifact.path / "annotator" / "delta.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, file)
    artifact.manifest["files"]["annotator/delta.safetensors"]["sha256"] = sha256_of(file)
    (artifact.path / "manifest.json").write_text(json.dumps(artifact.manifest))
    run()
    assert run.summary["weights"]["p1"] == 0
    assert run.summary["diverged"] == {"p1": "48 of its scores of 24 rows are no numbers"}
    assert voters(run) == {("p0", "p2")}
    assert set(metrics_of(run)["test"]["annotators"]) == {"p0", "p2"}
    for call in plan.find("annotate"):
        scored = run.store.find(call.stage, call.key)
        assert scored is not None
        assert (scored.path / "scores.parquet").exists() == (not call.label.startswith("p1 "))
        assert (scored.meta["rows"] == 0) == call.label.startswith("p1 ")


def test_scores_of_the_transfer_set_that_are_no_numbers_leave_an_annotator_out_of_everything(
    run: Run, break_scores: Callable[..., None]
) -> None:
    break_scores("transfer", THREE[0])
    run()
    assert run.summary["weights"]["p0"] == 0
    assert run.summary["diverged"] == {"p0": "2 of its scores of 24 rows are no numbers"}
    assert voters(run) == {("p1", "p2")}
    metrics = metrics_of(run)
    assert set(metrics["test"]["annotators"]) == {"p1", "p2"}
    assert set(metrics["cross_validation"]) == {"p1", "p2", "weighted"}


def test_scores_of_the_test_file_that_are_no_numbers_leave_an_annotator_out_of_the_test_alone(
    run: Run, tiny_task: MakeTask, break_scores: Callable[..., None]
) -> None:
    break_scores("test", THREE[0])
    run()
    assert all(weight > 0 for weight in run.summary["weights"].values())
    assert run.summary["diverged"] == {"p0": "2 of its scores of 10 rows are no numbers, in the test file"}
    assert voters(run) == {("p0", "p1", "p2")}
    metrics = metrics_of(run)
    assert set(metrics["cross_validation"]) == {"p0", "p1", "p2", "weighted"}
    assert set(metrics["test"]["annotators"]) == {"p1", "p2"}
    assert metrics["test"]["diverged"] == {"p0": "2 of its scores of 10 rows are no numbers"}
    without = Run(tiny_task("without", {"annotators": THREE[1:]}))
    without("ensemble.weights=uniform")
    for method in ("majority", "uniform"):
        assert metrics["test"]["methods"][method] == metrics_of(without)["test"]["methods"][method]


def test_weights_of_those_left_in_the_test_sum_to_one(run: Run, break_scores: Callable[..., None]) -> None:
    break_scores("test", *THREE[:2])
    run()
    metrics = metrics_of(run)
    assert set(metrics["test"]["annotators"]) == {"p2"}
    for method in ("majority", "uniform", "weighted", "oracle annotator"):
        assert metrics["test"]["methods"][method] == metrics["test"]["annotators"]["p2"]


def test_without_any_annotators_scores_of_the_test_file_the_student_is_tested_alone(
    run: Run, break_scores: Callable[..., None]
) -> None:
    break_scores("test", *THREE)
    run()
    methods = metrics_of(run)["test"]["methods"]
    assert [name for name, found in methods.items() if found is not None] == ["student"]
    assert set(methods) == set(METHODS)
    assert "| weighted | - | - | - |" in (run.version / "README.md").read_text()
    show_summary({**run.summary, "warnings": [], "executed": [], "seconds": {}, "new": True, "release": ""})


def test_scores_of_the_queue_that_are_no_numbers_cost_an_annotator_its_votes_alone(
    run: Run, break_scores: Callable[..., None]
) -> None:
    break_scores("queue", THREE[2])
    run()
    assert all(weight > 0 for weight in run.summary["weights"].values())
    assert run.summary["diverged"] == {"p2": "2 of its scores of 8 rows are no numbers, in the review queue"}
    assert voters(run) == {("p0", "p1")}
    assert set(metrics_of(run)["test"]["annotators"]) == {"p0", "p1", "p2"}


def test_queue_without_any_annotators_scores_is_in_order_of_the_students_margin(
    run: Run, break_scores: Callable[..., None]
) -> None:
    break_scores("queue", *THREE)
    run()
    rows = run.rows("review")
    assert [row["margin"] for row in rows] == sorted(row["margin"] for row in rows)
    assert all(row["votes"] == [] and row["disagreement"] == 0 for row in rows)


def test_teacher_whose_scores_are_no_numbers_teaches_nobody(run: Run, break_scores: Callable[..., None]) -> None:
    break_scores("transfer", *THREE[:2])
    with pytest.raises(InputError, match=r"fewer than two annotators are left \(p0: 2 of its scores of 24 rows"):
        run("ipet.generations=1")
    taught = {}
    for call in run.plan("ipet.generations=1").find("select"):
        drawn = run.store.find(call.stage, call.key)
        assert drawn is not None
        taught["annotate:002" in call.inputs] = drawn.meta["rows"] > 0
    assert taught == {True: True, False: False}


@pytest.mark.prefect
@pytest.mark.server
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
