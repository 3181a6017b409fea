"""The task file: what it means, and what is told of its mistakes."""

from __future__ import annotations

import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline import locations
from pipeline.base_model import resolve_base_model
from pipeline.errors import InputError
from pipeline.task import PRESETS, Task

SMALLEST = """\
labels: {good: [great, good], bad: awful}
inputs:
  unlabelled: rows.parquet
annotators: ["{text} It was {mask}."]
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a task file: ``write(text, "folder/task.yaml")``."""

    def write(text: str = SMALLEST, name: str = "reviews/task.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        Task.load(path, overrides)
    return str(caught.value)


def test_the_smallest_task_needs_labels_files_and_a_pattern(write: Callable[..., Path]) -> None:
    task = Task.load(write())
    assert task.name == "reviews"  # the folder's, since the file is called task.yaml
    assert task.label_names == ["good", "bad"]
    assert task.labels == {"good": ["great", "good"], "bad": ["awful"]}
    assert task.inputs.unlabelled == ["rows.parquet"]
    assert task.inputs.text == ["text"]
    assert [annotator.pattern for annotator in task.annotators] == ["{text} It was {mask}."]


def test_a_file_with_a_name_of_its_own_names_the_task(write: Callable[..., Path]) -> None:
    assert Task.load(write(name="moods.yaml")).name == "moods"


@pytest.mark.parametrize(
    ("extra", "key", "nearest", "line"),
    [
        ("trainig: {steps: 3}", "trainig", "training", 5),
        ("training:\n  steps: 3\n  learning_rat: 0.1", "training.learning_rat", "learning_rate", 7),
        ("student: {temprature: 3}", "student.temprature", "temperature", 5),
        ("relase:\n  path: out", "relase", "release", 5),
        ("ensemble:\n  wieghts: uniform", "ensemble.wieghts", "weights", 6),
    ],
)
def test_an_unknown_key_is_told_with_its_line_and_the_nearest_known_key(
    extra: str, key: str, nearest: str, line: int, write: Callable[..., Path]
) -> None:
    path = write(SMALLEST + extra + "\n")
    told = refusal(path)
    assert f"{path}:{line}: unknown key {key!r}; the nearest known key is {nearest!r}" in told


def test_a_key_that_stands_twice_is_told_with_both_lines(write: Callable[..., Path]) -> None:
    text = SMALLEST.replace("{good: [great, good], bad: awful}", "\n  good: great\n  good: fine\n  bad: awful")
    assert "the key 'good' is there twice, in lines 2 and 3" in refusal(write(text))
    assert "'training' is there twice" in refusal(write(SMALLEST + "training: {steps: 3}\ntraining: {folds: 3}\n"))


def test_words_and_labels_that_yaml_takes_for_truth_values_are_told_as_that(write: Callable[..., Path]) -> None:
    told = refusal(write(SMALLEST.replace("bad: awful", "bad: no")))
    assert "the word False is not text; quote it: YAML takes yes, no, on, off" in told
    assert "the label True is not text; quote it: YAML takes yes" in refusal(write(SMALLEST.replace("good:", "yes:")))
    assert 'the word 5 is not text; quote it: "5"' in refusal(write(SMALLEST.replace("awful", "5")))


def test_a_section_without_settings_is_as_if_it_were_not_there(write: Callable[..., Path]) -> None:
    assert Task.load(write(SMALLEST + "training:\nstudent:\n")) == Task.load(write(SMALLEST))
    assert "inputs: is missing" in refusal(write("labels: {good: a, bad: b}\ninputs:\nannotators: ['{text} {mask}']\n"))


def test_a_mistake_in_an_override_is_not_told_as_a_line_of_the_file(write: Callable[..., Path]) -> None:
    path = write(SMALLEST + "training:\n  steps: 3\n")
    assert refusal(path, "training.steps=x").startswith("--set: training.steps")
    assert refusal(write(SMALLEST + "training:\n  steps: x\n"), "training.folds=2").startswith(
        f"{path}:6: training.steps"
    )


def test_a_file_may_have_brackets_in_its_name(write: Callable[..., Path]) -> None:
    path = write()
    (path.parent / "pool [1].parquet").touch()
    task = Task.load(path, ["inputs.unlabelled=pool [1].parquet"])
    assert [file.name for file in task.matched_files()] == ["pool [1].parquet"]


def test_files_are_looked_for_beside_the_task_wherever_the_command_is_given(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    for folder in (path.parent, tmp_path):
        (folder / "rows.parquet").touch()
    monkeypatch.chdir(tmp_path)
    for location in (str(path), path.as_uri()):
        assert Task.load(location).matched_files() == [path.parent / "rows.parquet"]


def test_an_unknown_key_inside_inputs_and_in_an_annotator_is_found(write: Callable[..., Path]) -> None:
    path = write("""\
        labels: {good: great, bad: awful}
        inputs:
          unlabelled: rows.parquet
          labeled: few.parquet
        annotators:
          - "{text} It was {mask}."
          - pattern: "{mask}: {text}"
            seed: 3
        """)
    told = refusal(path)
    assert f"{path}:4: unknown key 'inputs.labeled'; the nearest known key is 'labelled'" in told
    assert f"{path}:8: unknown key 'annotators.1.seed'; the nearest known key is 'seeds'" in told


def test_all_mistakes_are_told_at_once_each_with_its_line(write: Callable[..., Path]) -> None:
    path = write("""\
        labels: {good: great}
        inputs:
          text: body
          on_bad_rows: ignore
        annotators: ["{text} It was {mask}", "{text} is it", "{mask} {mask} {text}"]
        training:
          steps: many
          max_length: 4
        surprise: 1
        """)
    told = refusal(path)
    for line, what in (
        (1, "labels: give at least two labels"),
        (2, "inputs.unlabelled: is missing"),
        (4, "inputs.on_bad_rows"),
        (5, "annotators.1.pattern: the pattern '{text} is it' has no {mask}"),
        (5, "annotators.2.pattern: the pattern '{mask} {mask} {text}' has {mask} more than once"),
        (7, "training.steps"),
        (8, "training.max_length"),
        (9, "unknown key 'surprise'"),
    ):
        assert any(row.startswith(f"{path}:{line}: {what}") for row in told.splitlines()), (line, what, told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": {"good": "great", "bad": None}}, "the label 'bad' has no word"),
        ({"labels": {"good": "great", "bad": []}}, "the label 'bad' has no word"),
        ({"labels": {True: "great", "bad": "awful"}}, "the label True is not text"),
        ({"annotators": []}, "annotators"),
        ({"annotators": ["{body} {mask}"]}, "names the column 'body', which is not among inputs.text"),
        (
            {"annotators": [{"pattern": "{text} {mask}", "words": {"good": "nice"}}]},
            "differ at 'bad'",
        ),
        (
            {"annotators": [{"pattern": "{text} {mask}", "name": "a"}, {"pattern": "{mask} {text}", "name": "a"}]},
            "two annotators are called 'a'",
        ),
        ({"name": "../../etc"}, "name"),
        ({"training": {"dtype": "float16"}}, "training.dtype"),
        ({"inputs": {"unlabelled": []}}, "inputs.unlabelled"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    change: dict[str, object], told: str, write: Callable[..., Path]
) -> None:
    assert told in refusal(write(yaml.safe_dump({**yaml.safe_load(SMALLEST), **change})))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("labels: [", "this is not YAML"),
        ("- a\n- b\n", "is a mapping"),
        ("", "is a mapping"),
        ("just words", "mapping"),
    ],
)
def test_a_file_that_is_no_task_is_refused(text: str, told: str, write: Callable[..., Path]) -> None:
    assert told in refusal(write(text))


def test_yaml_that_asks_for_python_objects_is_refused(write: Callable[..., Path]) -> None:
    assert "this is not YAML" in refusal(write(SMALLEST + "name: !!python/object/apply:os.getcwd []\n"))


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    assert "clozeline init" in refusal(tmp_path / "nothing.yaml")


def test_root_is_no_key_of_the_file(write: Callable[..., Path]) -> None:
    assert "unknown key 'root'" in refusal(write(SMALLEST + "root: /\n"))


# ---- paths ---------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_wherever_it_is_read_from(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write()
    (path.parent / "rows.parquet").touch()
    assert Task.load(path).unlabelled_files() == [path.parent / "rows.parquet"]
    monkeypatch.chdir(tmp_path)
    files = Task.load("reviews/task.yaml").unlabelled_files()
    assert [file.resolve() for file in files] == [path.parent / "rows.parquet"]


def test_an_absolute_path_stays_as_it_is(write: Callable[..., Path], tmp_path: Path) -> None:
    assert Task.load(write()).path(str(tmp_path / "far.parquet")) == tmp_path / "far.parquet"


def test_globs_give_each_file_once_in_order(write: Callable[..., Path]) -> None:
    path = write(SMALLEST.replace("rows.parquet", '["b-*.parquet", "*.parquet", "deep/**/*.parquet"]'))
    for name in ("b-2.parquet", "b-1.parquet", "a.parquet", "deep/er/c.parquet"):
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / name).touch()
    files = [file.relative_to(path.parent).as_posix() for file in Task.load(path).unlabelled_files()]
    assert files == ["b-1.parquet", "b-2.parquet", "a.parquet", "deep/er/c.parquet"]


def test_a_glob_without_a_match_says_where_it_looked(write: Callable[..., Path]) -> None:
    path = write()
    with pytest.raises(InputError, match=r"no file matches 'rows\.parquet'") as caught:
        Task.load(path).unlabelled_files()
    assert str(path.parent.resolve()) in str(caught.value)


# ---- settings given beside the file --------------------------------------------------------------------


def test_overrides_win_over_the_file_and_are_yaml(write: Callable[..., Path]) -> None:
    path = write(SMALLEST + "training: {steps: 5}\n")
    task = Task.load(
        path,
        ["training.steps=7", "inputs.carry=[a, b]", "labels.good=nice", "name=other", "release.path=null"],
    )
    assert task.training.steps == 7
    assert task.inputs.carry == ["a", "b"]
    assert task.labels["good"] == ["nice"]
    assert task.name == "other"
    assert task.release.path is None


def test_an_override_reaches_into_a_list(write: Callable[..., Path]) -> None:
    path = write(SMALLEST.replace('It was {mask}."]', '{mask}", {pattern: "{mask} {text}"}]'))
    task = Task.load(path, ["annotators.1.seeds=3"])
    assert [annotator.seeds for annotator in task.annotators] == [1, 3]
    assert [name for name, *_ in task.members()] == ["p0", "p1"]  # no labelled rows: one seed is as good as three


@pytest.mark.parametrize(
    "override",
    [
        "training.steps",
        "=3",
        "training..steps=3",
        "labels.good.x=3",
        "annotators.4=x",
        "annotators.9.seeds=2",
        "annotators.first=x",
        "name.x=1",
    ],
)
def test_an_override_that_leads_nowhere_is_refused(override: str, write: Callable[..., Path]) -> None:
    path = write(SMALLEST + "name: moods\n")
    assert "--set" in refusal(path, override)


def test_an_override_that_is_no_yaml_is_meant_as_it_stands(write: Callable[..., Path]) -> None:
    task = Task.load(write(), ["annotators.0={mask}: {text}", "student.template={text} [{text}]"])
    assert task.annotators[0].pattern == "{mask}: {text}"
    assert task.student_template == "{text} [{text}]"


def test_an_override_reaches_into_an_annotator_that_is_a_bare_pattern(write: Callable[..., Path]) -> None:
    (annotator,) = Task.load(write(), ["annotators.0.seeds=2"]).annotators
    assert (annotator.pattern, annotator.seeds) == ("{text} It was {mask}.", 2)


def test_an_override_with_an_unknown_key_names_the_nearest(write: Callable[..., Path]) -> None:
    assert "the nearest known key is 'steps'" in refusal(write(), "training.step=3")


# ---- what follows from a task --------------------------------------------------------------------------


def test_the_embedded_model_takes_the_quick_preset_and_any_other_the_papers(write: Callable[..., Path]) -> None:
    path = write()
    assert Task.load(path).preset == "quick"
    assert Task.load(path, ["base_model=./mine"]).preset == "paper"
    assert Task.load(path, ["training.preset=paper"]).preset == "paper"


def test_a_setting_in_the_file_wins_over_the_preset(write: Callable[..., Path]) -> None:
    task = Task.load(write(), ["training.preset=paper", "training.steps=0", "training.mlm_alpha=0.5"])
    training = task.resolved("training")
    assert training["steps"] == 0
    assert training["mlm_alpha"] == 0.5
    assert training["batch_size"] == 4
    assert task.resolved("student")["steps"] == 5000
    assert all(training[key] is not None for key in PRESETS["paper"]["training"])


@pytest.mark.parametrize(
    ("rows", "batch_size", "steps"),
    [(0, 16, 50), (10, 16, 50), (100, 16, 50), (231, 16, 116), (100, 4, 200), (1_000_000, 16, 1000)],
)
def test_steps_of_the_quick_preset_read_each_of_many_rows_eight_times(
    rows: int, batch_size: int, steps: int, write: Callable[..., Path]
) -> None:
    task = Task.load(write(), [f"training.batch_size={batch_size}"])
    assert task.training_on(rows)["steps"] == steps


def test_a_word_where_a_number_or_auto_belongs_is_told_by_its_key(write: Callable[..., Path]) -> None:
    first, second, _ = refusal(write(), "training.steps=many").splitlines()
    assert first == "--set: training.steps: Input should be 'auto'"
    assert second.startswith("--set: training.steps: Input should be a valid integer")
    assert "labels.constrained-x: " in refusal(write(SMALLEST.replace("bad: awful", "bad: awful, constrained-x: 3")))


def test_steps_that_are_given_or_the_papers_do_not_depend_on_the_rows(write: Callable[..., Path]) -> None:
    path = write()
    assert Task.load(path, ["training.steps=7"]).training_on(500)["steps"] == 7
    assert Task.load(path, ["training.preset=paper"]).training_on(500)["steps"] == 1000
    assert Task.load(path, ["training.preset=paper", "training.steps=auto"]).training_on(500)["steps"] == 1000
    assert Task.load(path, ["training.preset=paper", "training.steps=auto"]).training_on(50)["steps"] == 100


def test_the_quick_student_takes_more_steps_where_there_are_many_labels(write: Callable[..., Path]) -> None:
    assert Task.load(write()).resolved("student")["steps"] == 150
    labels = ", ".join(f"label{i}: word{i}" for i in range(60))
    many = write(SMALLEST.replace("{good: [great, good], bad: awful}", f"{{{labels}}}"))
    assert Task.load(many).resolved("student")["steps"] == 360
    assert Task.load(many, ["student.steps=9"]).resolved("student")["steps"] == 9


def test_an_annotator_may_have_words_of_its_own_in_the_tasks_order(write: Callable[..., Path]) -> None:
    task = Task.load(write(), ['annotators=[{pattern: "{text} {mask}", words: {bad: [nay], good: "yes!"}}]'])
    assert list(task.words_of(task.annotators[0]).items()) == [("good", ["yes!"]), ("bad", ["nay"])]


def test_the_student_reads_the_text_columns_joined_unless_told_otherwise(write: Callable[..., Path]) -> None:
    path = write()
    assert Task.load(path, ["inputs.text=[text, title]"]).student_template == "{text} {title}"
    assert Task.load(path, ["student.template='{text}!'"]).student_template == "{text}!"


# ---- behind URLs ---------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL with nothing below it, and brackets in its name."""
    monkeypatch.setenv("CLOZELINE_CACHE", str(tmp_path / "cache"))
    return f"memory://{uuid.uuid4().hex} [old]"


def test_paths_of_a_task_behind_a_url_start_from_its_directory(bucket: str, tmp_path: Path) -> None:
    locations.write(f"{bucket}/reviews/task.yaml", SMALLEST.replace("rows.parquet", "pool/day=*/part.parquet").encode())
    for day in (2, 1):
        locations.write(f"{bucket}/reviews/pool/day={day}/part.parquet", str(day).encode())
    task = Task.load(f"{bucket}/reviews/task.yaml")
    assert task.name == "reviews"
    files = task.matched_files()
    assert [file.read_text() for file in files] == ["1", "2"]
    assert [file.parts[-2:] for file in files] == [("day=1", "part.parquet"), ("day=2", "part.parquet")]
    assert all(tmp_path in file.parents for file in files)
    assert [task.source_of(file).removeprefix("memory:").lstrip("/") for file in files] == [
        f"{bucket.removeprefix('memory://')}/reviews/pool/day={day}/part.parquet" for day in (1, 2)
    ]
    assert Task.load(
        f"{bucket}/reviews/task.yaml", ["inputs.unlabelled=../reviews/pool/*/part.parquet"]
    ).matched_files() == (files)
    assert task.locate("other.parquet") == f"{bucket}/reviews/other.parquet"
    assert task.path(f"{bucket}/reviews/pool/day=2/part.parquet").read_text() == "2"


def test_a_local_task_may_name_files_behind_urls(bucket: str, write: Callable[..., Path]) -> None:
    pool = bucket.removesuffix(" [old]")  # brackets in what is given are a pattern
    locations.write(f"{pool}/a.parquet", b"a")
    here = write("", "reviews/rows.parquet")
    path = write(SMALLEST.replace("rows.parquet", f"[{pool}/*.parquet, rows.parquet]"))
    files = Task.load(path).matched_files()
    assert [file.read_text() for file in files] == ["a", ""]
    assert files[1] == here


def test_a_file_url_is_the_path(write: Callable[..., Path]) -> None:
    path = write(name="my reviews/task.yaml")
    task = Task.load(path.as_uri())
    assert task.name == "my-reviews"
    assert task.root == path.parent


def test_what_is_missing_behind_a_url_is_named(bucket: str) -> None:
    with pytest.raises(InputError, match="can't read the task file: there is no such file\n  in: memory://"):
        Task.load(f"{bucket}/task.yaml")
    locations.write(f"{bucket}/task.yaml", SMALLEST.encode())
    with pytest.raises(InputError, match=r"there is no such file\n  in: memory://.*/rows\.parquet"):
        Task.load(f"{bucket}/task.yaml").unlabelled_files()
    task = Task.load(f"{bucket}/task.yaml", ["inputs.unlabelled=rows-*.parquet"])
    with pytest.raises(InputError, match=r"no file matches 'rows-\*\.parquet'\n  in: .*looked in memory://"):
        task.unlabelled_files()
    locations.write(f"{bucket}/task.yaml", SMALLEST.replace("unlabelled", "unlabeled").encode())
    with pytest.raises(InputError, match=r"task\.yaml:3: unknown key 'inputs\.unlabeled'"):
        Task.load(f"{bucket}/task.yaml")


def test_a_base_model_behind_a_url_is_fetched_and_keeps_its_name(bucket: str, tiny_model: Path) -> None:
    for file in tiny_model.iterdir():
        locations.write(f"{bucket}/models/tiny/{file.name}", file.read_bytes())
    locations.write(f"{bucket}/task.yaml", (SMALLEST + "base_model: models/tiny\n").encode())
    task = Task.load(f"{bucket}/task.yaml")
    found, here = resolve_base_model(task.base_model, task.root), resolve_base_model(str(tiny_model))
    assert found.weights == here.weights
    assert Path(found.name).name == "tiny"
    assert task.source_of(found.path) == f"{bucket}/models/tiny"  # whatever machine reads it fetches it from there


def test_the_librarys_own_fields_are_no_keys(write: Callable[..., Path]) -> None:
    assert "unknown key 'base_url'" in refusal(write(SMALLEST + "base_url: s3://bucket\n"))
