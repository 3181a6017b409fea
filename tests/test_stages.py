"""The stages one behind the other, without Prefect: what is cached, what is rebuilt, and what comes out."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, load_dataset

from pipeline import tables
from pipeline.annotators import Texts
from pipeline.annotators.pet import PetAnnotator
from pipeline.checks import check_task
from pipeline.errors import InputError
from pipeline.plan import plan_run
from pipeline.predict import predict_file
from pipeline.progress import Progress
from pipeline.stages import run_stage
from pipeline.store import Artifact
from pipeline.tables import Floats, from_lists
from pipeline.task import Task
from tests.conftest import BAD, GOOD, sentence
from tests.stage_run import Run

MakeTask = Callable[..., Path]


@pytest.fixture
def run(tiny_task: MakeTask) -> Run:
    return Run(tiny_task())


def stages_of(titles: list[str]) -> set[str]:
    return {title.split()[0] for title in titles}


def more_rows(path: Path, rows: int, name: str, seed: int = 7) -> None:
    draw = random.Random(seed)
    columns = {
        "key": [f"{name}-{i}" for i in range(rows)],
        "text": [sentence(draw, GOOD if i % 3 else BAD) for i in range(rows)],
        "shop": ["east"] * rows,
    }
    pq.write_table(pa.table(columns), path)


def test_second_run_executes_nothing_and_gives_the_version_that_is_there(run: Run) -> None:
    assert stages_of(run()) >= {"ingest", "sample", "fit", "annotate", "blend", "distill", "label", "release"}
    first = run.published
    assert first.new
    assert run() == []
    assert run.published.path == first.path
    assert not run.published.new


def test_changed_pattern_refits_that_annotator_alone(run: Run) -> None:
    run()
    executed = run("annotators.1.pattern={text} All in all {mask}!")
    assert "fit p1" in executed
    assert not {"fit p0", "annotate p0 on transfer", "annotate p0 on test", "prepare", "sample transfer set"} & set(
        executed
    )
    assert {"blend", "distill", "label", "evaluate", "release"} <= stages_of(executed)
    assert "ingest" not in stages_of(executed)
    assert run.version.name.startswith("0002-")


def test_added_file_costs_no_fit_no_blend_and_no_distillation(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"inputs": {"unlabelled": "unlabelled*.parquet"}}))
    run()
    before = {row["row_id"]: row["label"] for split in ("rest", "review") for row in run.rows(split)}
    more_rows(run.path.parent / "unlabelled-2.parquet", 8, "added")
    executed = run()
    assert not {"fit", "blend", "distill", "sample", "evaluate"} & stages_of(executed)
    assert [title for title in executed if title.startswith("label")] == ["label unlabelled-2.parquet"]
    after = {row["row_id"]: row["label"] for split in ("rest", "review") for row in run.rows(split)}
    assert len(after) == len(before) + 8
    assert {key: after[key] for key in before} == before


def test_pool_that_outgrows_the_transfer_set_draws_it_again(tiny_task: MakeTask) -> None:
    changes = {"inputs": {"unlabelled": "unlabelled*.parquet"}, "sample": {"refresh_growth": 0.5}}
    run = Run(tiny_task(changes=changes))
    run()
    more_rows(run.path.parent / "unlabelled-2.parquet", 60, "added")
    assert {"sample", "fit", "distill"} <= stages_of(run())


def test_changed_labels_draw_the_transfer_set_from_all_files(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"inputs": {"unlabelled": "unlabelled*.parquet"}}))
    run()
    more_rows(run.path.parent / "unlabelled-2.parquet", 8, "added")
    assert "sample" not in stages_of(run())
    labelled = pq.read_table(run.path.parent / "labelled.parquet")
    pq.write_table(labelled.slice(0, 6), run.path.parent / "labelled.parquet")
    assert {"sample", "fit"} <= stages_of(run())
    [sample] = run.plan().find("sample")
    found = run.store.find("sample", sample.key)
    assert found is not None
    assert found.meta["pool_rows"] == 24 + 8


@pytest.mark.parametrize(
    "override", ["inputs.carry=[]", "inputs.on_bad_rows=quarantine", "inputs.id=null", "training.mlm_batch_size=9"]
)
def test_what_no_model_sees_refits_no_model(run: Run, override: str) -> None:
    run()
    assert not {"sample", "fit", "blend", "distill", "label", "evaluate"} & stages_of(run(override))


def test_crowd_of_equal_texts_does_not_starve_the_queue(tiny_task: MakeTask) -> None:
    path = tiny_task(changes={"inputs": {"id": None}})
    pool = pq.read_table(path.parent / "unlabelled.parquet")
    crowd = pa.concat_tables([pool.slice(0, 1)] * 200)
    pq.write_table(pa.concat_tables([crowd, pool]), path.parent / "unlabelled.parquet")
    run = Run(path)
    run()
    assert len({row["text"] for row in run.rows("review")}) == 5


def test_files_of_one_name_in_two_folders_are_told_apart(tiny_task: MakeTask) -> None:
    path = tiny_task(changes={"inputs": {"unlabelled": "day=*/part.parquet"}})
    for day in ("day=1", "day=2"):
        (path.parent / day).mkdir()
        more_rows(path.parent / day / "part.parquet", 8, day, seed=len(day) + int(day[-1]))
    executed = Run(path)()
    assert {"ingest day=1/part.parquet", "ingest day=2/part.parquet"} <= set(executed)


def test_carried_column_of_two_types_is_refused_before_any_stage(tiny_task: MakeTask) -> None:
    path = tiny_task(changes={"inputs": {"unlabelled": "unlabelled*.parquet"}})
    table = pq.read_table(path.parent / "unlabelled.parquet")
    numbers = table.set_column(2, "shop", pa.array(range(table.num_rows)))
    pq.write_table(numbers, path.parent / "unlabelled-2.parquet")
    with pytest.raises(InputError, match="'shop' holds"):
        Run(path).plan()


def test_release_setting_changes_no_model(run: Run) -> None:
    run()
    executed = run("release.review_budget=3")
    assert not {"fit", "distill", "label", "blend"} & stages_of(executed)
    assert len(run.rows("review")) == 3


def test_same_task_in_a_fresh_store_gives_the_same_bytes(tiny_task: MakeTask, tmp_path: Path) -> None:
    one = Run(tiny_task("one"))
    one()
    elsewhere = tmp_path / "elsewhere" / "deep"
    shutil.copytree(one.path.parent, elsewhere, ignore=shutil.ignore_patterns("store", "releases"))
    other = Run(elsewhere / "task.yaml")
    other("training.folds=0")  # something else first, in the same process: nothing of it may leak
    shutil.rmtree(other.out)
    other()
    assert other.bytes() == one.bytes()
    assert other.version.name == one.version.name


def test_every_stage_that_reads_the_pool_tells_how_far_it_is(tiny_task: MakeTask) -> None:
    run = Run(tiny_task())
    for call in run.plan().calls:
        told: list[tuple[int, int]] = []
        run_stage(call.request(run.store), lambda *said, told=told: told.append(said))
        assert told == sorted(told)
        if call.stage not in {"blend", "evaluate"}:
            assert told[-1][0] == told[-1][1] > 0, call.title


def test_rows_are_scored_some_at_a_time_with_the_same_scores(
    tiny_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, at_once = PetAnnotator.log_probabilities, list[int]()

    def log_probabilities(self: PetAnnotator, texts: Texts, progress: Progress | None = None) -> Floats:
        scores = real(self, texts, progress)
        if progress:  # as when a stage scores, not when a fit is cross-validated
            at_once.append(len(scores))
        return scores

    def scores(folder: str) -> dict[str, np.ndarray]:
        run, found = Run(tiny_task(folder)), {}
        for call in run.plan().calls:
            told: list[tuple[int, int]] = []
            artifact, _ = run_stage(call.request(run.store), lambda *said, told=told: told.append(said))
            if call.stage in {"annotate", "label"}:
                found[call.title] = from_lists(pq.read_table(artifact.path / "scores.parquet").column(0))
                assert told == sorted(told)
                assert told[-1] == (len(found[call.title]),) * 2
        return found

    monkeypatch.setattr(PetAnnotator, "log_probabilities", log_probabilities)
    whole = scores("whole")
    assert max(at_once) > 7
    at_once.clear()
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    for title, some in scores("some").items():
        assert np.allclose(some, whole[title], atol=1e-5)
    assert max(at_once) == 7


def test_release_holds_every_row_once_with_the_users_columns(run: Run) -> None:
    run()
    source = {row["key"]: row for row in pq.read_table(run.path.parent / "unlabelled.parquet").to_pylist()}
    rows = run.rows("review") + run.rows("rest")
    assert sorted(row["row_id"] for row in rows) == sorted(source)
    for row in rows:
        assert (row["text"], row["shop"]) == (source[row["row_id"]]["text"], source[row["row_id"]]["shop"])
        assert np.isclose(sum(row["probs"]), 1, atol=1e-5)
        assert row["label"] == int(np.argmax(row["probs"]))
        assert row["label_name"] == ["good", "bad"][row["label"]]
        assert row["confidence"] == max(row["probs"])
    train = {row["row_id"]: row["label_name"] for row in run.rows("train")}
    labelled = pq.read_table(run.path.parent / "labelled.parquet").to_pylist()
    assert train == {row["key"]: row["label"] for row in labelled}


def test_without_labelled_rows_how_far_shares_are_moved_changes_no_fit(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"inputs": {"labelled": None}, "ipet": {"generations": 1}}))
    plan, other = run.plan(), run.plan("training.match_prior=0.9")
    assert {call.key for call in plan.find("fit")} == {call.key for call in other.find("fit")}
    assert len(plan.find("fit")) == 4


def test_queue_is_in_order_of_priority_with_every_annotators_vote(run: Run) -> None:
    run()
    queue = run.rows("review")
    assert len(queue) == 5
    priorities = [row["priority"] for row in queue]
    assert priorities == sorted(priorities, reverse=True)
    assert all([vote["annotator"] for vote in row["votes"]] == ["p0", "p1"] for row in queue)
    assert all(row["reasons"] for row in queue)
    assert all(row["votes"] is None and row["priority"] is None for row in run.rows("rest"))


def test_queue_holds_its_rows_and_not_the_batches_they_came_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[float] = []
    write = tables.write_table

    def spy(path: Path, table: pa.Table) -> None:
        if path.name.startswith("review"):  # its rows are five of the one batch that is the pool
            held.append(table.column("text").chunk(0).get_total_buffer_size() / table.column("text").chunk(0).nbytes)
        write(path, table)

    monkeypatch.setattr(tables, "write_table", spy)
    run()
    assert len(held) == 1
    assert held[0] < 1.5


def test_release_loads_in_datasets_with_class_names_and_fixed_lengths(run: Run) -> None:
    run()
    dataset = load_dataset(str(run.version), cache_dir=str(run.out / "cache"))
    assert set(dataset) == {"review", "rest", "train"}
    features = dataset["review"].features
    assert features["label"] == ClassLabel(names=["good", "bad"])
    assert features["probs"].length == 2
    assert features["votes"].feature["label"] == ClassLabel(names=["good", "bad"])
    assert features["route"].names == ["review", "auto", "audit", "train", "rest"]


def test_student_loads_in_plain_transformers_and_agrees(run: Run) -> None:
    from transformers import pipeline

    run()
    row = run.rows("rest")[0]
    [answer] = pipeline("text-classification", model=str(run.version / "model"), top_k=None)([row["text"]])
    found = {entry["label"]: entry["score"] for entry in answer}
    assert found["good"] == pytest.approx(row["probs"][0], abs=1e-4)


def test_predict_gives_the_releases_labels(run: Run, tmp_path: Path) -> None:
    run()
    target = tmp_path / "out" / "predicted.parquet"
    source = run.path.parent / "unlabelled.parquet"
    assert predict_file(run.out, source, target) == 24
    predicted = {row["key"]: row["predicted_name"] for row in pq.read_table(target).to_pylist()}
    assert predicted == {row["row_id"]: row["label_name"] for split in ("rest", "review") for row in run.rows(split)}
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(InputError, match="neither a release nor a student"):
        predict_file(tmp_path, source, target)
    with pytest.raises(InputError, match="has a column 'predicted' already"):
        predict_file(run.out, target, tmp_path / "again.parquet")
    (run.out / "LATEST").unlink()
    with pytest.raises(InputError, match=f"no version of this release is in force(?s:.*)promote .* {run.version.name}"):
        predict_file(run.out, source, tmp_path / "again.parquet")


def test_predict_never_overwrites_what_it_reads_and_gives_rows_without_text_no_label(run: Run, tmp_path: Path) -> None:
    run()
    source = tmp_path / "source.parquet"
    pq.write_table(pa.table({"text": [GOOD[0], None, "  ", BAD[0]]}), source)
    (tmp_path / "link.parquet").symlink_to(source)
    for target in (source, tmp_path / "link.parquet"):
        with pytest.raises(InputError, match="this is the file to label"):
            predict_file(run.out, source, target)
    predict_file(run.out, source, tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["predicted_name"] is None for row in found] == [False, True, True, False]
    assert all((row["predicted"] is None) == (row["predicted_probs"] is None) for row in found)
    assert load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "c"))


def test_another_tasks_release_path_is_refused(run: Run) -> None:
    run()
    plan_run(Task.load(run.path), str(run.out))
    with pytest.raises(InputError, match=r"of the task 'tiny', and this one is called 'other'(?s:.*)write name: tiny"):
        plan_run(Task.load(run.path, ["name=other"]), str(run.out))


def test_no_labelled_rows_gives_a_zero_shot_release(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"inputs": {"labelled": None}}))
    run()
    assert len(run.rows("rest")) == 24 - 5
    metrics = json.loads((run.version / "metrics.json").read_text())
    assert metrics["best_annotator"] is None
    assert metrics["cross_validation"] is None
    assert metrics["summary"]["weights"] == {"p0": 0.5, "p1": 0.5}


def test_labelled_rows_in_the_pool_and_in_the_test_file_are_left_out(tiny_task: MakeTask) -> None:
    path = tiny_task()
    labelled = pq.read_table(path.parent / "labelled.parquet")
    for name, columns in (("unlabelled", ["key", "text", "shop"]), ("test", ["key", "text", "shop", "label"])):
        table = pq.read_table(path.parent / f"{name}.parquet")
        both = pa.concat_tables([table, labelled.select(columns)])
        pq.write_table(both, path.parent / f"{name}.parquet")
    run = Run(path)
    run()
    assert len(run.rows("rest")) + len(run.rows("review")) == 24
    metrics = json.loads((run.version / "metrics.json").read_text())
    assert metrics["test"]["dropped_as_labelled"] == 8
    assert metrics["summary"]["excluded_as_labelled"] == 8


def test_equal_texts_in_two_files_get_ids_of_their_own(tiny_task: MakeTask) -> None:
    path = tiny_task(changes={"inputs": {"id": None, "unlabelled": ["unlabelled.parquet", "copy.parquet"]}})
    table = pq.read_table(path.parent / "unlabelled.parquet")
    pq.write_table(table.slice(0, 6), path.parent / "copy.parquet")
    run = Run(path)
    run()
    ids = [row["row_id"] for split in ("rest", "review") for row in run.rows(split)]
    assert len(ids) == len(set(ids)) == 30
    assert sum(row_id.endswith("-2") for row_id in ids) == 6
    queue = [row["content_hash"] for row in run.rows("review")]
    assert len(queue) == len(set(queue))


def test_file_replaced_after_planning_is_refused(run: Run) -> None:
    plan = run.plan()
    more_rows(run.path.parent / "unlabelled.parquet", 5, "other")
    ingest = next(call for call in plan.calls if call.title == "ingest unlabelled.parquet")
    with pytest.raises(InputError, match="changed while the run was going on"):
        run_stage(ingest.request(run.store))


def test_keys_do_not_depend_on_paths_and_do_on_contents(tiny_task: MakeTask, tmp_path: Path) -> None:
    path = tiny_task("one")
    shutil.copytree(path.parent, tmp_path / "two")
    one, two = Run(path).plan(), Run(tmp_path / "two" / "task.yaml").plan()
    assert [call.key for call in one.calls] == [call.key for call in two.calls]
    more_rows(tmp_path / "two" / "unlabelled.parquet", 24, "other")
    assert Run(tmp_path / "two" / "task.yaml").plan().release.key != one.release.key


def test_conflicting_labels_of_one_text_are_refused(tiny_task: MakeTask) -> None:
    path = tiny_task()
    labelled = pq.read_table(path.parent / "labelled.parquet").to_pylist()
    labelled.append({**labelled[0], "key": "again", "label": "bad"})
    pq.write_table(pa.Table.from_pylist(labelled), path.parent / "labelled.parquet")
    with pytest.raises(InputError, match=r"rows 0 and 8 .* hold one text with different labels"):
        Run(path)()


def test_bad_rows_are_set_aside_when_asked(tiny_task: MakeTask) -> None:
    path = tiny_task(changes={"inputs": {"on_bad_rows": "quarantine"}})
    rows = pq.read_table(path.parent / "unlabelled.parquet").to_pylist()
    rows[3]["text"], rows[9]["text"] = None, "  "
    pq.write_table(pa.Table.from_pylist(rows), path.parent / "unlabelled.parquet")
    with pytest.raises(InputError, match="row 3 has no text"):
        Run(path)("inputs.on_bad_rows=fail")
    run = Run(path)
    run()
    assert len(run.rows("rest")) + len(run.rows("review")) == 22
    assert json.loads((run.version / "metrics.json").read_text())["summary"]["quarantined"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inputs.text=body", "names the column 'text', which is not among inputs.text"),
        ("inputs.unlabelled=none-*.parquet", "no file matches 'none-\\*.parquet'"),
        ("inputs.id=number", "there is no column 'number'"),
        ("labels={good: [good], poor: [bad]}", "row [0-9]+ has the unknown label 'bad'"),
        ("labels={good: [good], bad: [Good]}", "'Good' is shared by 'bad' and 'good'"),
        ("inputs.carry=[label]", "a release has a column 'label' of its own"),
        ("base_model=nowhere", "there is no base model 'nowhere'"),
        ("training.max_length=8", "tokens that the model reads"),
    ],
)
def test_mistakes_are_told_before_any_stage(run: Run, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run.plan(override)
    assert not (run.store.root / "ingest").exists()


def test_version_that_was_published_stays_when_another_follows(run: Run) -> None:
    run()
    first, content = run.version, run.bytes()
    run("release.review_budget=2")
    assert first.is_dir()
    assert (run.out / "LATEST").read_text().strip() == run.version.name != first.name
    run()  # back to the first inputs: the first version again, not a third
    assert run.version == first
    assert run.bytes() == content
    assert (run.out / "LATEST").read_text().strip() == first.name


def test_base_model_whose_head_is_not_in_its_file_is_refused(
    tiny_task: MakeTask, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    headless = tmp_path / "headless"
    shutil.copytree(tiny_model, headless)
    weights = {k: v for k, v in load_file(headless / "model.safetensors").items() if "transform" not in k}
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="masked-LM head is not in its file"):
        Run(tiny_task(changes={"base_model": str(headless)})).plan()


def test_unreadable_file_stops_the_run_unless_told_to_skip_it(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"inputs": {"unlabelled": "unlabelled*.parquet"}}))
    content = (run.path.parent / "unlabelled.parquet").read_bytes()
    (run.path.parent / "unlabelled-2.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"unlabelled-2\.parquet"):
        run.plan()
    skip = "inputs.on_bad_files=skip"
    assert check_task(Task.load(run.path, [skip])) == ["unlabelled-2.parquet can't be read as Parquet and is left out"]
    run(skip)
    assert len(run.rows("rest")) + len(run.rows("review")) == 24


# ---- iPET ----------------------------------------------------------------------------------------------


def found(run: Run, title: str, *overrides: str) -> Artifact:
    """What the stage of a title left."""
    call = next(call for call in run.plan(*overrides).calls if call.title == title)
    artifact = run.store.find(call.stage, call.key)
    assert artifact is not None
    return artifact


@pytest.mark.parametrize("labelled", ["labelled.parquet", None])
def test_generations_train_on_drawn_rows_and_the_last_is_used(tiny_task: MakeTask, labelled: str | None) -> None:
    run = Run(tiny_task(changes={"ipet": {"generations": 2, "growth": 1.5}, "inputs": {"labelled": labelled}}))
    executed = run()
    order = [title for title in executed if title.split()[0] in {"fit", "select"} and " p0" in title]
    assert order == [
        "fit p0",
        "select p0 generation 1",
        "fit p0 generation 1",
        "select p0 generation 2",
        "fit p0 generation 2",
    ]
    assert [title for title in executed if title.startswith("annotate p0")] == [
        "annotate p0 on transfer",
        "annotate p0 generation 1 on transfer",
        "annotate p0 generation 2 on transfer",
        "annotate p0 generation 2 on queue",
        "annotate p0 generation 2 on test",
    ]
    # 8 labelled rows become 12 and 18 in all; without them ten are drawn, then half as many again, rounded up.
    rows = [found(run, f"select p0 generation {generation}").meta["label_counts"] for generation in (1, 2)]
    expected = [(2, 2), (5, 5)] if labelled else [(5, 5), (8, 8)]
    assert [(counts["good"], counts["bad"]) for counts in rows] == expected
    fitted = found(run, "fit p0 generation 2")
    assert fitted.meta["labelled_rows"] == (8 if labelled else 0)
    assert fitted.meta["drawn_rows"] == sum(expected[1])
    assert run() == []


def test_drawn_rows_come_from_the_transfer_set_with_the_labels_they_were_drawn_for(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"ipet": {"generations": 1, "growth": 2}}))
    run()
    drawn = pq.read_table(found(run, "select p0 generation 1").path / "rows.parquet")
    assert drawn.column_names == ["content_hash", "text.text", "label"]
    texts = drawn.column("text.text").to_pylist()
    assert len(set(texts)) == len(texts) == 8
    assert set(texts) <= set(pq.read_table(run.path.parent / "unlabelled.parquet").column("text").to_pylist())
    # With two annotators the other one is the teacher; rows beyond its predictions are told.
    scores = pq.read_table(found(run, "annotate p1 on transfer").path / "scores.parquet").column(0).to_pylist()
    sample = pq.read_table(found(run, "sample transfer set").path / "rows.parquet").column("text.text").to_pylist()
    predicted = dict(zip(sample, np.argmax(scores, axis=1).tolist(), strict=True))
    other = sum(predicted[text] != label for text, label in zip(texts, drawn.column("label").to_pylist(), strict=True))
    assert other <= sum(found(run, "select p0 generation 1").meta["filled"].values())


def test_weights_and_cross_validation_are_those_of_generation_0(tiny_task: MakeTask) -> None:
    run = Run(tiny_task())
    run()
    plain = json.loads((run.version / "metrics.json").read_text())
    run("ipet.generations=1")
    metrics = json.loads((run.version / "metrics.json").read_text())
    assert metrics["summary"]["weights"] == plain["summary"]["weights"]
    assert metrics["cross_validation"] == plain["cross_validation"]
    assert not (found(run, "fit p0 generation 1", "ipet.generations=1").path / "cv.parquet").exists()
    for name in ("README.md", "report.html"):
        assert "generation 1 of iPET" in (run.version / name).read_text()
    run()
    assert all("iPET" not in (run.version / name).read_text() for name in ("README.md", "report.html"))


def test_one_annotator_teaches_itself(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"annotators": ["{text} It was {mask}."], "ipet": {"generations": 2, "growth": 1.5}}))
    assert "fit p0 generation 2" in run()
    assert run() == []


def test_seeds_of_one_pattern_are_others_once_they_are_trained(tiny_task: MakeTask) -> None:
    annotator = {"pattern": "{text} It was {mask}.", "seeds": 3}
    changes = {"annotators": [annotator], "inputs": {"labelled": None}, "ipet": {"generations": 1}}
    executed = Run(tiny_task(changes=changes))()
    assert [title for title in executed if title.startswith("fit")] == [
        "fit p0-s0",
        *(f"fit p0-s{seed} generation 1" for seed in range(3)),
    ]


def test_changed_growth_refits_later_generations_alone(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"ipet": {"generations": 1}}))
    run("ipet.growth=2")
    fits = [title for title in run("ipet.growth=1.5") if title.startswith(("fit", "select"))]
    assert sorted(fits) == [
        "fit p0 generation 1",
        "fit p1 generation 1",
        "select p0 generation 1",
        "select p1 generation 1",
    ]


def test_growth_does_not_touch_the_first_generation_without_labelled_rows(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"inputs": {"labelled": None}, "ipet": {"generations": 2}}))

    def keys(growth: float) -> dict[str, str]:
        return {call.title: call.key for call in run.plan(f"ipet.growth={growth}").calls}

    one, other = keys(2), keys(3)
    assert one["fit p0 generation 1"] == other["fit p0 generation 1"]
    assert one["fit p0 generation 2"] != other["fit p0 generation 2"]


def test_another_generation_leaves_those_before_as_they_are(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"ipet": {"growth": 1.5}}))
    run()
    for generation in (1, 2):
        fits = {title for title in run(f"ipet.generations={generation}") if title.startswith("fit")}
        assert fits == {f"fit p{i} generation {generation}" for i in (0, 1)}


def test_settings_of_ipet_change_no_key_where_it_is_off(run: Run) -> None:
    plain = [call.key for call in run.plan().calls]
    assert [call.key for call in run.plan("ipet.growth=2", "ipet.share=0.5").calls] == plain
    assert not run.plan().find("select")
