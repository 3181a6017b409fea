"""The whole command in processes of its own, with a real Prefect server: runs, kills, exit codes."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.machine import Machine, bytes_of

pytestmark = pytest.mark.prefect
MakeTask = Callable[..., Path]


def test_run_publishes_and_the_same_command_does_nothing_again(machine: Machine, tiny_task: MakeTask) -> None:
    path = str(tiny_task())
    first = machine.summary(path)
    assert first["new"]
    assert "fit p0" in first["executed"]
    assert first["rows"] == {"review": 5, "rest": 19, "train": 8}
    assert first["test"]["student"]["rows"] == 10
    again = machine.summary(path)
    assert again["executed"] == []
    assert (again["release"], again["new"]) == (first["release"], False)
    changed = machine.summary(path, "--set", "annotators.1.pattern={text} All in all {mask}!")
    assert "fit p1" in changed["executed"]
    assert "fit p0" not in changed["executed"]
    code, out, _ = machine.clozeline("run", path, "--dry-run", "--json")
    assert code == 0
    assert all(stage["cached"] for stage in json.loads(out)["stages"])
    machine.wait_until_nothing_runs()


@pytest.mark.server
def test_run_killed_at_any_moment_ends_with_the_same_bytes(
    machine: Machine, tiny_task: MakeTask, tmp_path: Path, prefect_home: Path
) -> None:
    path = str(tiny_task(changes={"training": {"steps": 20}, "student": {"steps": 20}}))
    calm = machine.summary(path)
    other = Machine(tmp_path / "killed", prefect_home)
    draw = random.Random(11)
    kills = 0
    while kills < 4:
        process = other.start("run", path, "--json")
        # Most of the work lies a few seconds behind the start; a kill may also hit the start itself.
        time.sleep(draw.uniform(1.0, 12.0))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        other.wait_until_nothing_runs()
    assert kills >= 1
    final = other.summary(path)
    assert bytes_of(final["release"]) == bytes_of(calm["release"])
    assert Path(final["release"]).name == Path(calm["release"]).name
    tmp = other.root / ".clozeline" / "store" / "tmp"
    assert not list(tmp.iterdir())


@pytest.mark.server
def test_lost_stage_process_is_retried(machine: Machine, tiny_task: MakeTask) -> None:
    process = machine.start("run", str(tiny_task(changes={"training": {"steps": 60}})), "--json")
    until = time.monotonic() + 60
    killed = False
    while not killed and time.monotonic() < until:
        for found in psutil.Process(process.pid).children(recursive=True):
            try:
                # Once its store holds a running fit, the worker is in the middle of one.
                busy = list((machine.root / ".clozeline" / "store" / "tmp").glob("fit-*"))
                if "pipeline.worker" in " ".join(found.cmdline()) and busy:
                    found.kill()
                    killed = True
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.02)
    out, err = process.communicate(timeout=200)
    assert killed
    assert process.returncode == 0, err
    assert json.loads(out)["new"]


def test_ctrl_c_stops_and_leaves_no_process(machine: Machine, tiny_task: MakeTask) -> None:
    process = machine.start("run", str(tiny_task(changes={"training": {"steps": 5000}})))
    until = time.monotonic() + 60
    while not list((machine.root / ".clozeline" / "store" / "tmp").glob("fit-*")):
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on from here" in err
    machine.wait_until_nothing_runs()


@pytest.mark.server
def test_a_version_that_looks_worse_fails_the_run_and_promote_puts_it_in_force(
    machine: Machine, tiny_task: MakeTask, prefect_home: Path
) -> None:
    path = str(tiny_task())
    first = Path(machine.summary(path)["release"])
    release = first.parent.parent
    worse = ("run", path, "--set", "release.review_budget=3", "--set", "release.gate.min_rows=2")
    for _ in range(2):  # held once, and held still
        code, _, err = machine.clozeline(*worse)
        assert code == 1
        for part in ("is held: LATEST stays at", "32 rows are fewer than 2 times the 32 rows", "clozeline promote"):
            assert part in err
    assert (release / "LATEST").read_text().strip() == first.name
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        query = "select s.type, s.message from flow_run f join flow_run_state s on s.id = f.state_id"
        failed = [message for kind, message in database.execute(query) if kind == "FAILED" and str(release) in message]
    assert len(failed) == 2
    assert all("32 rows are fewer than 2 times" in message for message in failed)

    code, out, _ = machine.clozeline("versions", str(release), "--json")
    assert (code, [version["state"] for version in json.loads(out)]) == (0, ["in force", "held"])
    code, out, _ = machine.clozeline("store", "gc", "--json")
    assert (code, json.loads(out)["goes"]) == (0, [])  # what the held version was made of is kept as well
    held = json.loads(machine.clozeline("promote", str(release), "--json")[1])["in_force"]
    assert held != first.name
    assert (release / "LATEST").read_text().strip() == held
    code, out, err = machine.clozeline(*worse, "--json")
    assert code == 0, err
    assert (Path(json.loads(out)["release"]).name, json.loads(out)["new"]) == (held, False)


def test_wrong_input_exits_with_2_and_names_the_fix(machine: Machine, tiny_task: MakeTask) -> None:
    path = tiny_task()
    for arguments, message in [
        (
            ("run", str(path), "--set", "training.stepz=3"),
            "unknown key 'training.stepz'; the nearest known key is 'steps'",
        ),
        (("check", str(path), "--set", "inputs.text=body"), "which is not among inputs.text"),
        (("run", str(path.parent / "none.yaml")), "`clozeline init` writes one"),
        (("predict", str(path.parent), "in.parquet", "out.parquet"), "neither a release nor a student"),
        (("run", str(path), "--bogus"), "--bogus"),
    ]:
        code, _, err = machine.clozeline(*arguments)
        assert (code, message in err) == (2, True), err
    assert not (machine.root / ".clozeline").exists()


def test_error_found_by_a_stage_exits_with_2(machine: Machine, tiny_task: MakeTask) -> None:
    path = tiny_task()
    rows = pq.read_table(path.parent / "unlabelled.parquet").to_pylist()
    rows[4]["key"] = rows[2]["key"]
    pq.write_table(pa.Table.from_pylist(rows), path.parent / "unlabelled.parquet")
    code, _, err = machine.clozeline("run", str(path))
    assert code == 2
    assert "row 4 has the id 'unlabelled-2', as row 2 has" in err
    machine.wait_until_nothing_runs()


def test_unwritable_release_directory_exits_with_2(machine: Machine, tiny_task: MakeTask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    code, _, err = machine.clozeline("run", str(tiny_task()), "--out", str(tmp_path / "file" / "releases"))
    assert code == 2
    assert "can't write the release" in err


def test_init_check_and_preview_on_the_same_file(machine: Machine, tiny_task: MakeTask, tiny_model: Path) -> None:
    folder = tiny_task().parent
    target = folder / "drafted.yaml"
    code, out, err = machine.clozeline(
        "init", str(folder / "labelled.parquet"), "--unlabelled", "unlabelled.parquet", "--out", str(target)
    )
    assert code == 0, err
    assert "clozeline check" in out
    code, _, err = machine.clozeline("init", str(folder / "labelled.parquet"), "--out", str(target))
    assert (code, "the file is there already" in err) == (2, True)
    use_tiny = ("--set", f"base_model={tiny_model}", "--set", "training.max_length=48")
    code, out, err = machine.clozeline("check", str(target), *use_tiny, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 24
    code, out, err = machine.clozeline("preview", str(target), *use_tiny, "--json")
    assert code == 0, err
    patterns = json.loads(out)["patterns"]
    assert [found["words"] for found in patterns] == [{"bad": ["bad"], "good": ["good"]}] * 2
    assert all("[MASK]" in example for found in patterns for example in found["examples"])
