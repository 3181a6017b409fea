"""The benchmark of quality: the shape of its results, resuming, and that its numbers are those of the flow."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import InputError, Task
from pipeline.base_model import resolve_base_model
from pipeline.plan import build_plan
from pipeline.stages import run_stage
from pipeline.store import Store
from pipeline.template import Encoder
from pipeline.verbalizer import Verbalizer
from tests.conftest import BAD, GOOD, sentence

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not in the source distribution")


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with few steps of fine-tuning."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality

    monkeypatch.setitem(quality.FINE_TUNE, "steps", 30)
    return quality


@pytest.fixture
def benchmark(tmp_path: Path, tiny_task: Callable[..., Path]) -> tuple[Path, Path]:
    """A directory with the dataset ``tiny``, and its task file."""
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    random_ = random.Random(1)
    for name, rows in (("train", 40), ("test", 12)):
        moods = [i % 2 for i in range(rows)]
        columns = {
            "id": [f"{name}-{i}" for i in range(rows)],
            "text": [sentence(random_, BAD if mood else GOOD) for mood in moods],
            "label": ["bad" if mood else "good" for mood in moods],
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder.parent, tiny_task()


def by_method(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["method"]: record for record in records}


@pytest.mark.parametrize(("rows", "counts"), [(3, [1, 1, 1]), (10, [7, 2, 1]), (40, [30, 8, 2]), (100, [75, 20, 5])])
def test_draws_keep_the_shares_and_every_label(quality: Any, rows: int, counts: list[int]) -> None:
    labels = np.repeat([0, 1, 2], [75, 20, 5])
    drawn = quality.draw(labels, rows, seed=0)
    assert len(set(drawn.tolist())) == rows
    assert np.bincount(labels[drawn]).tolist() == counts


def test_draws_differ_by_seed_alone(quality: Any) -> None:
    labels = np.repeat([0, 1], 50)
    assert quality.draw(labels, 10, 0).tolist() == quality.draw(labels, 10, 0).tolist()
    assert quality.draw(labels, 10, 0).tolist() != quality.draw(labels, 10, 1).tolist()


@pytest.mark.parametrize("rows", [1, 101])
def test_impossible_draws_are_refused(quality: Any, rows: int) -> None:
    with pytest.raises(InputError, match=f"can't draw {rows} of 100 rows"):
        quality.draw(np.repeat([0, 1], 50), rows, 0)


def test_rows_of_a_cell_never_meet(quality: Any, benchmark: tuple[Path, Path]) -> None:
    data, task = benchmark
    train = pq.read_table(data / "tiny" / "train.parquet")
    test = pq.read_table(data / "tiny" / "test.parquet")
    pq.write_table(pa.concat_tables([train, train.slice(0, 5), test.slice(0, 4)]), data / "tiny" / "train.parquet")
    loaded = quality.Dataset.load(data / "tiny", Task.load(task), 20)
    labelled, transfer = loaded.cut(8, 0)
    texts = [*labelled.texts["text"], *transfer["text"], *test.column("text").to_pylist()]
    assert len(texts) == len(set(texts)) == 8 + 20 + 12
    given = dict(zip(train.column("text").to_pylist(), train.column("label").to_pylist(), strict=True))
    assert [given[text] for text in labelled.texts["text"]] == [["good", "bad"][i] for i in labelled.labels]


def test_with_dev_the_test_rows_are_nowhere(quality: Any, benchmark: tuple[Path, Path]) -> None:
    data, task = benchmark
    train = pq.read_table(data / "tiny" / "train.parquet")
    test = pq.read_table(data / "tiny" / "test.parquet")
    pq.write_table(pa.concat_tables([train, test.slice(0, 4)]), data / "tiny" / "train.parquet")
    pool = [*test.column("text").to_pylist(), *train.column("text").to_pylist(), "only here"]
    pq.write_table(pa.table({"text": pool}), data / "tiny" / "unlabeled.parquet")
    loaded = quality.Dataset.load(data / "tiny", Task.load(task), 15, dev=True)
    labelled, transfer = loaded.cut(8, 0)
    judged = loaded.test.texts["text"]
    assert len(judged) == 15
    seen = [*labelled.texts["text"], *transfer["text"], *loaded.train.texts["text"], *loaded.unlabelled.texts["text"]]
    assert not set(seen) & {*judged, *test.column("text").to_pylist()}
    assert set(judged) <= set(train.column("text").to_pylist())


def test_the_transfer_set_comes_from_the_unlabelled_file(quality: Any, benchmark: tuple[Path, Path]) -> None:
    data, task = benchmark
    pq.write_table(pa.table({"text": ["only here", "and here"]}), data / "tiny" / "unlabeled.parquet")
    _, transfer = quality.Dataset.load(data / "tiny", Task.load(task), 20).cut(8, 0)
    assert sorted(transfer["text"]) == ["and here", "only here"]


def test_one_record_a_method_and_finished_cells_are_not_run_again(
    quality: Any, benchmark: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, task = benchmark
    out = tmp_path / "quality.jsonl"

    def run(seeds: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = quality.run(data, ["tiny"], [0, 8], seeds, task=task, cap=10, out=out)
        return found

    records = run(1)
    fields = ["dataset", "labels", "seed", "method", "accuracy", "macro_f1", "seconds"]
    assert all(list(record) == fields for record in records)
    both = [*quality.METHODS, *quality.RIVALS]
    assert [(r["labels"], r["seed"], r["method"]) for r in records] == [
        *((0, 0, name) for name in quality.METHODS),
        *((8, 0, name) for name in both),
    ]
    count = len(quality.METHODS)
    without, with_labels = by_method(records[:count]), by_method(records[count:])
    able = {name for name, record in without.items() if record["accuracy"] is not None}
    assert able == {"zero-shot", "ensemble", "student"}
    assert without["ensemble"]["accuracy"] == without["zero-shot"]["accuracy"]
    assert all(0 <= record["accuracy"] <= 1 and record["seconds"] > 0 for record in with_labels.values())
    assert len(out.read_text().splitlines()) == 3

    with out.open("a") as file:
        file.write('{"key": "cut off in the mid')  # killed while it wrote
    ran = []
    run_half = quality.run_half
    monkeypatch.setattr(quality, "run_half", lambda *half: ran.append(half[1:]) or run_half(*half))
    assert run(1) == records
    assert ran == []
    more = run(2)
    assert ran == [(8, 1, "prompting"), (8, 1, "rivals")]
    assert more[: len(records)] == records
    assert run(2) == more
    assert len(ran) == 2

    ran.clear()
    shares = [quality.run(data, ["tiny"], [0, 8], 3, task=task, cap=10, out=out, share=(k, 2)) for k in (1, 2)]
    assert sorted(ran) == [(8, 2, "prompting"), (8, 2, "rivals")]
    assert [[(r["labels"], r["seed"], r["method"]) for r in share[:: len(both) // 2]] for share in shares] == [
        [(0, 0, "zero-shot"), *((8, seed, "fine-tune") for seed in range(3))],
        [(8, seed, "zero-shot") for seed in range(3)],
    ]

    ran.clear()
    changed = yaml.safe_load(task.read_text())
    changed["training"]["learning_rate"] = 3e-4
    task.write_text(yaml.safe_dump(changed, sort_keys=False))
    run(1)
    assert ran == [(0, 0, "prompting"), (8, 0, "prompting")]
    ran.clear()
    monkeypatch.setitem(quality.FINE_TUNE, "steps", 3)
    run(1)
    assert ran == [(8, 0, "rivals")]


def test_no_cross_validation_without_two_rows_of_each_label(quality: Any, benchmark: tuple[Path, Path]) -> None:
    data, task = benchmark
    records = by_method(quality.run_half(quality.Dataset.load(data / "tiny", Task.load(task), 10), 2, 0, "prompting"))
    assert records["best-annotator"]["accuracy"] is None
    assert records["best-annotator"]["seconds"] is None
    assert records["ensemble"]["accuracy"] is not None


@pytest.mark.parametrize(("prior", "generations"), [("none", 0), ("labelled", 0), ("none", 2)])
def test_the_numbers_are_those_of_the_flow(
    quality: Any, benchmark: tuple[Path, Path], tmp_path: Path, prior: str, generations: int
) -> None:
    data, task_file = benchmark
    raw = yaml.safe_load(task_file.read_text())
    # Enough steps for the annotators to differ, so that equal figures mean something.
    raw["training"] |= {"steps": 6, "learning_rate": 3e-3, "mlm_alpha": 0.01}
    raw["student"] |= {"steps": 6, "learning_rate": 3e-3}
    raw["ensemble"] = {"prior": prior}
    raw["ipet"] = {"generations": generations, "growth": 1.5}
    raw["inputs"] |= {"id": None, "carry": []}
    task_file.write_text(yaml.safe_dump(raw, sort_keys=False))
    loaded = quality.Dataset.load(data / "tiny", Task.load(task_file), 100)
    records = by_method(quality.run_half(loaded, 10, 0, "prompting"))

    labelled, transfer = loaded.cut(10, 0)
    names = list(raw["labels"])
    for name, texts, labels in (
        ("labelled", labelled.texts, labelled.labels),
        ("unlabelled", transfer, None),
        ("test", loaded.test.texts, loaded.test.labels),
    ):
        columns = {**texts, **({} if labels is None else {"label": [names[i] for i in labels]})}
        pq.write_table(pa.table(columns), task_file.parent / f"{name}.parquet")
    task = Task.load(task_file)
    plan = build_plan(task, resolve_base_model(task.base_model, task.root))
    store = Store(tmp_path / "store")
    for call in plan.calls:
        artifact, _ = run_stage(call.request(store))
        if call.stage == "evaluate":
            found = json.loads((artifact.path / "metrics.json").read_text())["test"]["methods"]
    same = [("best-annotator", "best annotator"), ("ensemble", "weighted"), ("student", "student")]
    if generations:
        same = [("ipet", "weighted"), ("ipet-student", "student")]
    for mine, theirs in same:
        for metric in ("accuracy", "macro_f1"):
            assert records[mine][metric] == found[theirs][metric], (mine, metric)


@pytest.mark.parametrize("labels", [0, 8])
def test_generations_are_measured_beside_the_ensemble(
    quality: Any, benchmark: tuple[Path, Path], tmp_path: Path, labels: int
) -> None:
    data, task = benchmark

    def run(generations: int) -> list[dict[str, Any]]:
        out = tmp_path / "quality.jsonl"
        found: list[dict[str, Any]] = quality.run(
            data, ["tiny"], [labels], 1, task=task, cap=12, ipet=generations, out=out
        )
        return found

    plain, with_ipet = run(0), run(1)
    rivals = quality.RIVALS if labels else []
    assert [record["method"] for record in with_ipet] == [*quality.METHODS, "ipet", "ipet-student", *rivals]
    later = [record for record in with_ipet if record["method"].startswith("ipet")]
    assert all(record["accuracy"] is not None and record["seconds"] > 0 for record in later)
    figures = [[(r["method"], r["accuracy"], r["macro_f1"]) for r in records] for records in (plain, with_ipet)]
    assert figures[0] == [figure for figure in figures[1] if not figure[0].startswith("ipet")]
    assert run(0) == plain  # both are kept
    assert "| ipet | ipet-student |" in quality.table(with_ipet, 12)


def test_fine_tuning_gets_its_label_shares_matched_as_annotators_do(
    quality: Any, benchmark: tuple[Path, Path], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, task = benchmark

    def run(strength: float) -> dict[str, dict[str, Any]]:
        given = Task.load(task, [f"training.match_prior={strength}"])
        loaded = quality.Dataset.load(data / "tiny", given, 12, original=tiny_model)
        found: dict[str, dict[str, Any]] = by_method(quality.run_half(loaded, 8, 0, "rivals"))
        return found

    monkeypatch.setattr(quality, "smoothed_shares", lambda counts: np.array([0.9999, 0.0001]))  # all of one label
    moved, left = run(1.0), run(0.0)
    for name in ("fine-tune", "original-fine-tune"):
        assert moved[name]["macro_f1"] == left[name]["macro_f1"] != pytest.approx(1 / 3, abs=1e-3)
        assert moved[f"{name}-matched"]["macro_f1"] == pytest.approx(1 / 3, abs=1e-3)
        assert left[f"{name}-matched"]["macro_f1"] is None
    table = quality.paired([{**record, "seed": seed} for seed in (0, 1) for record in moved.values()])
    rivals = [line.split(" | ")[2] for line in table.splitlines()[4:]]
    assert rivals == ["fine-tune", "fine-tune-matched", "original-fine-tune", "original-fine-tune-matched"]


def test_the_table_has_means_and_spreads(quality: Any) -> None:
    rows = [
        {"dataset": "d", "labels": 8, "seed": seed, "method": name, "accuracy": value, "macro_f1": 0.5, "seconds": 1.0}
        for name in [*quality.METHODS, *quality.RIVALS]
        for seed, value in enumerate([None, None] if name == "best-annotator" else [0.5, 0.6])
    ]
    table = quality.table(rows, 2000)
    assert "| d | 8 | 2 | 55.0 ± 7.1 | - | 55.0 ± 7.1 |" in table
    assert "at most 2,000 rows" in table


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "tasks").glob("*.yaml")), ids=lambda path: path.stem)
def test_task_files_have_words_of_one_token(path: Path) -> None:
    from pipeline.base_model import load_tokenizer

    task = Task.load(path)
    base = resolve_base_model(task.base_model)
    tokenizer = load_tokenizer(base.path)
    Encoder(tokenizer, 128)
    for _, annotator, _ in task.members():
        assert Verbalizer.resolve(task.words_of(annotator), tokenizer).widths == [1]
    assert task.name == path.stem


def test_label_words_have_the_same_tokens_whatever_the_tokenizer_file_says() -> None:
    """The embedded tokenizer's file asks for padding to 128 tokens."""
    from pipeline.base_model import load_tokenizer

    tokenizer = load_tokenizer(resolve_base_model("embedded").path)
    assert Verbalizer.resolve({"good": ["great"], "bad": ["terrible"]}, tokenizer).widths == [1]


def test_make_ag_news_writes_a_whole_task(quality: Any, tmp_path: Path) -> None:
    import make_ag_news

    folder = tmp_path / "data" / "ag_news"
    folder.mkdir(parents=True)
    names = ["World", "Sports", "Business", "Sci/Tech"]
    for name, rows in (("train", 60), ("test", 8)):
        columns = {
            "id": [f"{name}-{i}" for i in range(rows)],
            "title": ["" if i % 3 else f"title {name} {i}" for i in range(rows)],
            "description": [f"text {name} {i}" for i in range(rows)],
            "label": [names[i % 4] for i in range(rows)],
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    task = Task.load(make_ag_news.make(folder.parent, tmp_path / "out", unlabelled=15))
    labelled, unlabelled, test = (
        pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in ("labelled", "unlabelled", "test")
    )
    assert (labelled.num_rows, unlabelled.num_rows, test.num_rows) == (40, 15, 8)
    assert unlabelled.column_names == ["id", "title", "description"]
    assert not set(labelled.column("id").to_pylist()) & set(unlabelled.column("id").to_pylist())
    assert len(task.annotators) == 4
    plan = build_plan(task, resolve_base_model(task.base_model, task.root))
    assert plan.rows == 15
    # The labelled rows are those of the benchmark's draw 0.
    drawn, _ = quality.Dataset.load(folder, Task.load(BENCHMARKS / "tasks" / "ag_news.yaml"), 100).cut(40, 0)
    assert drawn.texts["description"] == labelled.column("description").to_pylist()
