"""Hostile input, from end to end: a right result, or an error that names the place and the fix; nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import stages, transfer
from pipeline.checks import check_task
from pipeline.errors import InputError
from pipeline.locations import inside, write_atomically
from pipeline.predict import find_student, predict_file
from pipeline.preview import preview_task
from pipeline.release import OWN_COLUMNS
from pipeline.stages import run_stage
from pipeline.starter import starter_task
from pipeline.task import Task
from pipeline.versions import version_in_force
from tests.conftest import latest_manifest
from tests.machine import Machine, bytes_of
from tests.stage_run import Run

MakeTask = Callable[..., Path]


@pytest.fixture
def run(tiny_task: MakeTask) -> Run:
    return Run(tiny_task())


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change the rows of a Parquet file."""
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)


def unlabelled(run: Run) -> list[dict[str, Any]]:
    return run.rows("review") + run.rows("rest")


def mistake(call: Callable[[], object]) -> str:
    """What is told of a mistake; nothing where there was none."""
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


# ---- texts ---------------------------------------------------------------------------------------------

NASTY = {
    "long": "the food was good and warm. " * 37_500,
    "one long word": "x" * 1_000_000,
    "emoji": "\N{GRINNING FACE} the \N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET} \N{SNOWMAN}\N{VARIATION SELECTOR-16}",
    "controls": "a\x00b\x01c\x07\x1b[31m\x7f\x85\u2028\u2029\ufeff\ufffe the food was good",
    "right to left": "\u202e\u05d8\u05d5\u05d1 \u0637\u064a\u0628\u202c good",
    "combining": "e" + "\u0301" * 500,
    "special tokens": "[MASK] [SEP] [CLS] [PAD] </s> <mask> <pad> {text} {mask} {{",
    "markup": "<script>alert(1)</script> =cmd|' /C calc'!A0 | `x` \" ' \\",
    "line breaks": "good\r\n\n\tfood\rwas",
}


def test_texts_of_every_kind_go_through_and_come_out_as_they_were(tiny_task: MakeTask, tmp_path: Path) -> None:
    run = Run(tiny_task())
    for name in ("unlabelled", "labelled", "test"):

        def put(rows: list[dict[str, Any]], name: str = name) -> None:
            for row, text in zip(rows, NASTY.values(), strict=False):
                row["text"] = f"{name}: {text}"

        rewrite(run.path.parent / f"{name}.parquet", put)
    run("release.review_budget=24")
    queue = run.rows("review")
    given = {row["key"]: row["text"] for row in pq.read_table(run.path.parent / "unlabelled.parquet").to_pylist()}
    assert {row["row_id"]: row["text"] for row in queue} == given
    assert all(np.isclose(sum(row["probs"]), 1, atol=1e-5) for row in queue)
    tasks = json.loads((run.version / "exports" / "label_studio.json").read_text(encoding="utf-8"))
    assert {task["data"]["row_id"]: task["data"]["text"] for task in tasks} == given
    lines = (run.version / "exports" / "doccano.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert {row["row_id"]: row["text"] for row in map(json.loads, lines)} == given
    loaded = load_dataset(str(run.version), cache_dir=str(tmp_path / "cache"))
    assert dict(zip(loaded["review"]["row_id"], loaded["review"]["text"], strict=True)) == given
    predict_file(run.out, run.path.parent / "unlabelled.parquet", tmp_path / "predicted.parquet")
    predicted = {row["key"]: row["predicted"] for row in pq.read_table(tmp_path / "predicted.parquet").to_pylist()}
    assert predicted == {row["row_id"]: row["label"] for row in queue}


def not_utf8(values: list[bytes]) -> pa.Array:
    """A string column of bytes as they come: Arrow and Parquet hold what they are given."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


SURROGATE = "\ud800".encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("column", ["text", "key", "shop"])
@pytest.mark.parametrize("broken", [SURROGATE, "caf\u00e9".encode("latin-1")], ids=["surrogate", "latin-1"])
def test_text_that_is_not_utf8_is_told_with_its_row_and_column(column: str, broken: bytes, run: Run) -> None:
    path = run.path.parent / "unlabelled.parquet"
    table = pq.read_table(path)
    values = [str(value).encode() for value in table.column(column).to_pylist()]
    values[7] = broken
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, not_utf8(values)), path)
    with pytest.raises(InputError, match="row 7 holds text that is not UTF-8") as caught:
        run()
    assert f"{path}, column {column}" in str(caught.value)


def test_nested_column_that_is_not_utf8_is_told_with_its_row(run: Run) -> None:
    path = run.path.parent / "unlabelled.parquet"
    table = pq.read_table(path)
    tags = pa.ListArray.from_arrays(pa.array(range(25), pa.int32()), not_utf8([*[b"a"] * 5, SURROGATE, *[b"b"] * 18]))
    pq.write_table(table.set_column(2, "shop", tags), path)
    labelled = pq.read_table(run.path.parent / "labelled.parquet").drop_columns(["shop"])
    pq.write_table(labelled, run.path.parent / "labelled.parquet")
    with pytest.raises(InputError, match="row 5 holds text that is not UTF-8"):
        run()


def test_label_that_is_not_utf8_is_told_before_any_stage(run: Run) -> None:
    path = run.path.parent / "labelled.parquet"
    table = pq.read_table(path)
    labels = not_utf8([b"good", b"bad", SURROGATE, *[b"good"] * 5])
    pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", labels), path)
    with pytest.raises(InputError, match=r"row 2 holds text that is not UTF-8\n.*labelled\.parquet, column label"):
        run.plan()


def test_every_reader_of_a_users_file_tells_text_that_is_not_utf8(run: Run, tmp_path: Path) -> None:
    run()
    path = run.path.parent / "unlabelled.parquet"
    pq.write_table(pa.table({"key": ["a", "b"], "text": not_utf8([b"good", SURROGATE]), "shop": ["x", "y"]}), path)
    readers: list[Callable[[], object]] = [
        run.plan,
        lambda: preview_task(Task.load(run.path)),
        lambda: starter_task(path),
        lambda: predict_file(run.out, path, tmp_path / "out.parquet"),
        lambda: check_task(Task.load(run.path, ["base_model=embedded"])),
    ]
    for reader in readers:
        with pytest.raises(InputError, match="row 1 holds text that is not UTF-8"):
            reader()
    assert not list(tmp_path.glob("*out.parquet*"))


# ---- files and rows ------------------------------------------------------------------------------------


def test_file_without_rows_beside_others_changes_nothing(tiny_task: MakeTask) -> None:
    path = tiny_task(changes={"inputs": {"unlabelled": ["a-empty.parquet", "unlabelled.parquet"]}})
    empty = pq.read_table(path.parent / "unlabelled.parquet").slice(0, 0)
    pq.write_table(empty, path.parent / "a-empty.parquet")
    run = Run(path)
    run()
    assert len(unlabelled(run)) == 24


def test_only_empty_files_are_refused(run: Run) -> None:
    path = run.path.parent / "unlabelled.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(InputError, match="the unlabelled files hold no row"):
        run.plan()


def test_labelled_and_test_files_without_rows_are_as_if_there_were_none(run: Run) -> None:
    for name in ("labelled", "test"):
        path = run.path.parent / f"{name}.parquet"
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    run()
    assert len(unlabelled(run)) == 24
    assert run.summary["rows"] == {"review": 5, "rest": 19}
    assert run.summary["test"] is None
    told = check_task(Task.load(run.path))
    for name in ("labelled", "test"):
        assert f"the {name} file holds no row: the run goes on as if there were none" in told


def test_damage_behind_a_whole_footer_is_told_by_the_plan(run: Run) -> None:
    path = run.path.parent / "unlabelled.parquet"
    texts = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    start = texts.dictionary_page_offset or texts.data_page_offset
    data[start : start + texts.total_compressed_size] = b"\xff" * texts.total_compressed_size
    path.write_bytes(data)
    with pytest.raises(InputError, match="can't read this Parquet to its end") as caught:
        run.plan()
    assert str(path) in str(caught.value)


def test_ninety_nine_to_one_is_matched_and_measured(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"annotators": ["{text} It was {mask}."]}, labelled=100, test=100))
    for name in ("labelled", "test"):

        def skew(rows: list[dict[str, Any]]) -> None:
            for number, row in enumerate(rows):
                row["label"] = "bad" if number == 1 else "good"

        rewrite(run.path.parent / f"{name}.parquet", skew)
    run("ensemble.prior=labelled")
    [blend] = run.plan("ensemble.prior=labelled").find("blend")
    blended = run.store.find("blend", blend.key)
    assert blended is not None
    assert blended.meta["soft_shares"]["bad"] == pytest.approx(2 / 102, abs=0.005)  # the labelled shares, smoothed
    assert len(unlabelled(run)) == 24
    metrics = json.loads((run.version / "metrics.json").read_text())
    assert metrics["cross_validation"] is None  # of one row nothing can be held out
    assert metrics["test"]["methods"]["student"]["per_label"]["bad"]["rows"] == 1
    assert 0 <= metrics["test"]["methods"]["student"]["macro_f1"] <= 1


def test_label_without_rows_is_warned_of_and_takes_part(tiny_task: MakeTask) -> None:
    run = Run(tiny_task(changes={"labels": {"good": ["good"], "bad": ["bad"], "mixed": ["quite"]}}))
    assert "no labelled row has the label mixed: the patterns alone must find it" in check_task(Task.load(run.path))
    run()
    assert set(run.summary["label_counts"]) == {"good", "bad", "mixed"}
    assert all(len(row["probs"]) == 3 and min(row["probs"]) > 0 for row in unlabelled(run))


# ---- columns named like ours ---------------------------------------------------------------------------


def test_columns_named_like_a_releases_own_may_be_there_but_not_be_carried_or_read(run: Run) -> None:
    path = run.path.parent / "unlabelled.parquet"
    table = pq.read_table(path)
    for name in OWN_COLUMNS:
        table = table.append_column(name, table.column("text"))
    pq.write_table(table, path)
    run.plan()
    for setting in (f"inputs.carry={json.dumps(OWN_COLUMNS)}", f"inputs.text={json.dumps(['text', *OWN_COLUMNS])}"):
        told = mistake(lambda setting=setting: run.plan(setting))
        assert all(f"a release has a column {name!r} of its own" in told for name in OWN_COLUMNS)


def test_columns_named_like_what_stages_and_predictions_add_are_carried_along(run: Run) -> None:
    names = ["text.", "text.text", "carry.shop", "predicted", "shard", "row", "margins", "p_good"]
    path = run.path.parent / "unlabelled.parquet"
    table = pq.read_table(path)
    for name in names:
        table = table.append_column(name, pa.array([f"{name} {i}" for i in range(24)]))
    pq.write_table(table, path)
    run(f"inputs.carry={json.dumps(['shop', *names])}")
    source = {row["key"]: row for row in table.to_pylist()}
    for row in unlabelled(run):
        assert {name: row[name] for name in names} == {name: source[row["row_id"]][name] for name in names}


def test_text_column_that_would_overwrite_a_probability_in_an_export_is_refused(run: Run) -> None:
    with pytest.raises(InputError, match="the export for Label Studio has a field 'p_good' of its own"):
        run.plan("inputs.text=[p_good, text]")


# ---- files that change, and damage in the store --------------------------------------------------------


def test_file_replaced_between_its_hash_and_its_rows_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.path.parent / "unlabelled.parquet"
    ingest = next(call for call in run.plan().calls if call.title == "ingest unlabelled.parquet")
    whole = stages.sha256_of

    def hashed_then_replaced(file: Path) -> str:
        digest = whole(file)
        pq.write_table(pq.read_table(file).slice(0, 20), path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        return digest

    monkeypatch.setattr(stages, "sha256_of", hashed_then_replaced)
    with pytest.raises(InputError, match="changed while the run was going on"):
        run_stage(ingest.request(run.store))
    assert run.store.find("ingest", ingest.key) is None


def test_artifacts_that_lost_a_byte_are_built_again_to_the_same_bytes(run: Run) -> None:
    run()
    content = run.bytes()
    for stage, name in (
        ("ingest", "rows.parquet"),
        ("distill", "model/model.safetensors"),
        ("release", "version/README.md"),
    ):
        for artifact in (run.store.root / stage).iterdir():
            (artifact / name).write_bytes((artifact / name).read_bytes()[:-1])
    executed = run()
    assert {title.split()[0] for title in executed} == {"ingest", "distill", "release"}
    assert run.bytes() == content


@pytest.mark.prefect
@pytest.mark.server
def test_two_runs_at_once_on_one_store_give_the_same_bytes(machine: Machine, run: Run, tmp_path: Path) -> None:
    outs = [str(tmp_path / name) for name in ("one", "two")]
    running = [machine.start("run", str(run.path), "--out", out, "--json") for out in outs]
    told = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    one, two = (json.loads(out) for out, _ in told)
    assert bytes_of(one["release"]) == bytes_of(two["release"])
    assert not set(one["executed"]) & set(two["executed"])  # each stage was run by one of them


# ---- directories that can't be written, and full disks -------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small disk: ``mount("size=4m")``."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"can't mount a disk here (only root may): {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


Refused = Callable[[], object]


def writers(run: Run, place: Path) -> dict[str, Refused]:
    """Whatever writes where a user says, writing below a place; each with what its error must name."""
    remote = f"memory://{uuid.uuid4().hex}/rows.parquet"
    with fsspec.open(remote, "wb") as file:
        file.write((run.path.parent / "unlabelled.parquet").read_bytes())
    elsewhere = Run(run.path, place / "store")
    published = Run(run.path, run.store.root)
    published.out = place / "releases"
    return {
        "CLOZELINE_STORE": elsewhere,
        "--out": published,
        "OUT.parquet": lambda: predict_file(run.out, run.path.parent / "unlabelled.parquet", place / "o" / "p.parquet"),
        "CLOZELINE_CACHE": lambda: transfer.fetch_file(remote, place / "cache"),
    }


@pytest.mark.parametrize("kind", ["below a file", "read-only disk", "no permission"])
def test_directory_that_cannot_be_written_is_told_with_the_setting_to_change(
    kind: str, run: Run, mount: Callable[[str], Path], tmp_path: Path
) -> None:
    if kind == "no permission" and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    run()
    place = tmp_path / "place"
    if kind == "below a file":
        place.touch()
    elif kind == "read-only disk":
        place = mount("ro,size=1m")
    else:
        place.mkdir(mode=0o500)
    for setting, refused in writers(run, place).items():
        with pytest.raises(InputError, match="can't write") as caught:
            refused()
        assert str(place) in str(caught.value)
        assert setting in str(caught.value)


def test_full_disk_is_told_and_the_same_command_goes_on_when_there_is_room(
    run: Run, mount: Callable[[str], Path]
) -> None:
    run()
    disk = mount("size=24m")
    tight = Run(run.path, disk / "store")
    tight.out = disk / "releases"
    ballast, failures = disk / "ballast", 0
    free = iter(range(0, 24_000_000, 250_000))
    while True:
        # Whatever is free is taken but for a little more each time, so that it fails at one stage after the other.
        left = next(free)
        found = os.statvfs(disk)
        size = (ballast.stat().st_size if ballast.exists() else 0) + found.f_bavail * found.f_frsize - left
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        told = mistake(tight)
        if told == "":
            break
        failures += 1
        assert "the disk is full" in told
        assert f"in: {disk}" in told
        assert not list((disk / "store" / "tmp").glob("*"))
        assert latest_manifest(tight.out) is None
    assert failures >= 3
    assert tight.bytes() == run.bytes()
    assert tight.version.name == run.version.name


def test_full_disk_under_a_prediction_leaves_no_half_file(run: Run, mount: Callable[[str], Path]) -> None:
    run()
    disk = mount("size=4k")
    with pytest.raises(InputError, match="the disk is full") as caught:
        predict_file(run.out, run.path.parent / "unlabelled.parquet", disk / "predicted.parquet")
    assert str(disk) in str(caught.value)
    assert not list(disk.iterdir())


def test_full_disk_under_a_small_file_leaves_the_old_one(mount: Callable[[str], Path]) -> None:
    disk = mount("size=8k")
    write_atomically(disk / "LATEST", "old")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(disk / "LATEST", "new" * 4000)
    assert [path.read_text() for path in disk.iterdir()] == ["old"]


# ---- YAML ----------------------------------------------------------------------------------------------

BILLIONS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
BOMBS = {
    "aliases of aliases": (BILLIONS, "unfold to more than"),
    "aliases of merged mappings": (
        "a0: &a0 {k0: x}\n" + "".join(f"a{i}: &a{i} {{l: *a{i - 1}, r: *a{i - 1}}}\n" for i in range(1, 40)),
        "unfold to more than",
    ),
    "a node that holds itself": ("labels: &a [*a]\n", "unfold to more than"),
    "a mapping that holds itself": ("labels: &a {good: *a}\n", "unfold to more than"),
    "nested brackets": ("labels: " + "[" * 10_000 + "]" * 10_000, "nested too deeply"),
    "nested mappings": ("{a: " * 10_000 + "x" + "}" * 10_000, "nested too deeply"),
    "a date that there is not": ("name: 2001-99-99\n", "this is not YAML: a value can't be read: month must be"),
    "an endless number": ("name: " + "9" * 5000 + "\n", "this is not YAML: a value can't be read"),
    "a tag that does not fit": ("name: !!bool x\n", "this is not YAML: a value can't be read"),
    "half a character": ('name: "\\ud800"\n', r"holds half a character: .*\\ud800"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_bomb_is_refused_at_once(bomb: str, tmp_path: Path) -> None:
    text, told = BOMBS[bomb]
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(InputError, match=told) as caught:
        Task.load(tmp_path / "task.yaml")
    assert str(tmp_path / "task.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("labels=[&a [*a]]", "unfold to more than"),
        ("labels=" + "[" * 10_000, "nested too deeply"),
        ("labels={a: &a [x,x,x,x,x,x,x,x,x,x], " + BILLIONS.replace("\n", ", ").replace("a0: ", "b: ") + "}", "unfold"),
        ('labels.good="\\ud800"', "half a character"),
        ("labels.good=\udcff", "half a character"),  # a byte that is no UTF-8 on the command line
        ("sample.refresh_growth=.inf", "finite number"),
        ("annotators.\u00b2=x", "the list has no entry"),
    ],
)
def test_bomb_in_an_override_is_refused_at_once(override: str, told: str, run: Run) -> None:
    with pytest.raises(InputError, match=told):
        Task.load(run.path, [override])


def test_date_that_there_is_not_is_text_in_an_override(run: Run) -> None:
    assert Task.load(run.path, ["name=2001-99-99"]).name == "2001-99-99"


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "task.yaml"
    path.write_text(
        "labels: {good: great, bad: awful}\n"
        "inputs: {unlabelled: rows.parquet}\n"
        "annotators: ['{text} {mask}', '{mask} {text}']\n"
    )
    return path


DEEPER = ["labels.good", "inputs.text", "annotators.0", "annotators.1.words", "training.steps", "sample.rows_per_label"]
KEYS = st.sampled_from([*Task.model_fields, *DEEPER])
VALUES = st.text(max_size=20) | st.text(st.sampled_from("[]{}:,&*!|>-'\"#%@`? \n.~=<0aex_"), max_size=20)


@settings(max_examples=200)
@given(key=KEYS | st.text(st.characters(), max_size=8), value=VALUES)
def test_any_override_gives_a_task_or_a_told_mistake(key: str, value: str, task_file: Path) -> None:
    mistake(lambda: Task.load(task_file, [f"{key}={value}"]))  # whatever else is raised fails the test


@given(
    steps=st.integers(0, 100_000),
    rate=st.floats(1e-12, 0.1),
    words=st.lists(st.text(min_size=1), min_size=1, max_size=3),
    prior=st.sampled_from(["none", "labelled"]),
)
def test_overrides_come_back_as_they_were_given(
    steps: int, rate: float, words: list[str], prior: str, task_file: Path
) -> None:
    given = {"training.steps": steps, "training.learning_rate": rate, "labels.good": words, "ensemble.prior": prior}
    task = Task.load(task_file, [f"{key}={yaml.safe_dump(value)}" for key, value in given.items()])
    found = task.training.steps, task.training.learning_rate, task.labels["good"], task.ensemble.prior
    assert found == (steps, rate, words, prior)


# ---- paths that climb out of their root ----------------------------------------------------------------


@given(st.text(st.sampled_from("./ab\0\\"), max_size=12))
def test_name_is_inside_its_root_or_refused(name: str) -> None:
    root = Path("/data/root")
    told = mistake(lambda: inside(root, name))
    if told:
        assert repr(name) in told
    else:
        assert "\0" not in name
        assert Path(os.path.normpath(inside(root, name))).is_relative_to(root)


@pytest.mark.parametrize("latest", ["../../elsewhere", "../elsewhere", "/etc", "..", "", "\x00", "\udcff", "0001"])
def test_latest_that_leads_elsewhere_counts_for_nothing(latest: str, run: Run) -> None:
    run()
    elsewhere = run.out.parent / "elsewhere"
    elsewhere.mkdir()
    (run.version / "model").rename(elsewhere / "model")
    (run.out / "LATEST").write_bytes(latest.encode("utf-8", "surrogateescape"))
    assert version_in_force(run.out) is None
    assert latest_manifest(run.out) is None
    with pytest.raises(InputError, match="no version of this release is in force"):
        find_student(run.out)


def test_latest_behind_a_url_that_leads_elsewhere_counts_for_nothing() -> None:
    url = f"memory://{uuid.uuid4().hex}/a/releases"
    with fsspec.open(f"{url}/LATEST", "wb") as file:
        file.write(b"../../../b/0001-00000000")
    assert version_in_force(url) is None


def test_listing_with_a_name_that_climbs_writes_nothing_outside(tmp_path: Path) -> None:
    bucket = uuid.uuid4().hex
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/{bucket}/tree/config.json", b"{}")
    # As an object store lists it, to which ".." is a name like any other.
    memory.store[f"/{bucket}/tree/../../../evil"] = memory.store[f"/{bucket}/tree/config.json"]
    try:
        with pytest.raises(InputError, match=r"leads out of its directory|leads above the bucket"):
            transfer.fetch_tree(f"memory://{bucket}/tree", tmp_path / "cache")
    finally:
        del memory.store[f"/{bucket}/tree/../../../evil"]
    assert not [path for path in tmp_path.rglob("*") if path.name == "evil"]
    assert not list((tmp_path / "cache").glob("trees/*"))


# ---- the command line ----------------------------------------------------------------------------------


def test_commands_end_with_2_and_name_the_place_and_the_fix(
    machine: Machine, run: Run, tmp_path: Path, mount: Callable[[str], Path]
) -> None:
    folder, file = run.path.parent, tmp_path / "file"
    file.touch()
    (folder / "bomb.yaml").write_text(BILLIONS)
    cut = (folder / "unlabelled.parquet").read_bytes()[:-9]
    (folder / "cut.parquet").write_bytes(cut)
    (folder / "empty.parquet").touch()
    pq.write_table(pa.table({"text": not_utf8([b"a", SURROGATE])}), folder / "surrogate.parquet")
    task = str(run.path)
    plain = ("--set", "inputs.id=null", "--set", "inputs.carry=[]", "--set")
    tight = mount("size=4m")
    for arguments, variables, parts in [
        (("check", str(folder / "bomb.yaml")), {}, ["bomb.yaml", "unfold", "write the values out"]),
        (("check", task, "--set", "labels=" + "[" * 10_000), {}, ["--set", "nested too deeply"]),
        (("run", task, "--set", "inputs.unlabelled=cut.parquet"), {}, ["cut.parquet", "write it again"]),
        (("run", task, "--set", "inputs.labelled=empty.parquet"), {}, ["empty.parquet", "write it again"]),
        (("run", task, *plain, "inputs.unlabelled=surrogate.parquet"), {}, ["row 1", "surrogate.parquet", "as UTF-8"]),
        (("init", str(folder / "labelled.parquet"), "--out", str(file / "t.yaml")), {}, [str(file), "another --out"]),
        (("run", task), {"CLOZELINE_STORE": str(file / "store")}, [str(file), "CLOZELINE_STORE"]),
        (("check", task), {"CLOZELINE_STORE": str(file / "store")}, ["can't write the store", "CLOZELINE_STORE"]),
        (("run", task), {"CLOZELINE_STORE": str(tight / "store")}, [str(tight), "4 MB are free", "CLOZELINE_STORE"]),
    ]:
        machine.environment.pop("CLOZELINE_STORE", None)
        machine.environment |= variables
        code, _, told = machine.clozeline(*arguments)
        assert (code, [part for part in parts if part not in told]) == (2, []), told
        assert "Traceback" not in told
