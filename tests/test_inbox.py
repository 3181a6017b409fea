"""What has landed among a task's files."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.inbox import Inbox, Mark, snapshot
from pipeline.locations import filesystem
from pipeline.task import Task

TASK = """
labels: {good: good, bad: bad}
inputs: {unlabelled: in/*.parquet, labelled: labelled.parquet}
annotators: ["{text} It was {mask}."]
"""
_clock = iter(range(1_700_000_000, 2_000_000_000))


def land(file: Path, size: int = 10) -> None:
    """Write a file (the inbox reads no content), at a time of its own."""
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x" * size)
    now = next(_clock)
    os.utime(file, (now, now))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "task.yaml").write_text(TASK)
    land(tmp_path / "in" / "a.parquet")
    land(tmp_path / "labelled.parquet")
    return tmp_path


def inbox_in(root: Path) -> Inbox:
    return Inbox(str(root / "task.yaml"), root / "state")


def names(files: list[str]) -> list[str]:
    return [Path(file).name for file in files]


def settle(root: Path) -> None:
    """Announce and acknowledge what is there."""
    inbox = inbox_in(root)
    inbox.changes()
    inbox.changes()
    inbox.acknowledge()


def test_a_snapshot_holds_the_size_and_time_of_unlabelled_and_labelled_files(root: Path) -> None:
    land(root / "in" / "notes.txt")
    status = (root / "in" / "a.parquet").stat()
    found = snapshot(Task.load(root / "task.yaml"))
    assert found[str(root / "in" / "a.parquet")] == (status.st_size, status.st_mtime_ns)
    assert names(list(found)) == ["a.parquet", "labelled.parquet"]


def test_files_are_announced_at_the_second_look(root: Path) -> None:
    inbox = inbox_in(root)
    assert inbox.changes() == []
    assert names(inbox.changes()) == ["a.parquet", "labelled.parquet"]


def test_a_file_that_grows_is_announced_once_it_stands_still(root: Path) -> None:
    settle(root)
    inbox = inbox_in(root)
    for size in (5, 50, 500):
        land(root / "in" / "b.parquet", size)
        assert inbox.changes() == []
    assert names(inbox.changes()) == ["b.parquet"]


def test_what_is_acknowledged_is_announced_again_only_when_it_changes(root: Path) -> None:
    settle(root)
    inbox = inbox_in(root)
    assert inbox.changes() == inbox.changes() == []
    land(root / "in" / "a.parquet")  # of the same size, written again
    assert inbox.changes() == []
    assert names(inbox.changes()) == ["a.parquet"]


def test_an_announcement_that_was_not_acknowledged_is_repeated_by_the_next_process(root: Path) -> None:
    settle(root)
    land(root / "in" / "b.parquet")
    inbox_in(root).changes()
    assert names(inbox_in(root).changes()) == ["b.parquet"]
    assert names(inbox_in(root).changes()) == ["b.parquet"]


def test_what_changed_after_the_look_is_not_acknowledged_with_it(root: Path) -> None:
    inbox = inbox_in(root)
    inbox.changes()
    inbox.changes()
    land(root / "in" / "a.parquet", 99)
    inbox.acknowledge()
    assert inbox.changes() == []
    assert names(inbox.changes()) == ["a.parquet"]


def test_a_file_that_went_and_came_back_is_announced(root: Path) -> None:
    land(root / "in" / "b.parquet")
    settle(root)
    kept = root / "b.parquet"
    (root / "in" / "b.parquet").rename(kept)
    settle(root)
    kept.rename(root / "in" / "b.parquet")
    inbox = inbox_in(root)
    inbox.changes()
    assert names(inbox.changes()) == ["b.parquet"]


def test_a_damaged_state_repeats_rather_than_loses(root: Path) -> None:
    settle(root)
    [state] = (root / "state").iterdir()
    assert state.name.startswith(root.name)  # as the task is called: after its directory
    for text in ("", "{", "[]", '{"looked": 3}', json.dumps({"looked": {"f": [1]}, "acknowledged": {}})):
        state.write_text(text)
        inbox = inbox_in(root)
        inbox.changes()
        assert names(inbox.changes()) == ["a.parquet", "labelled.parquet"]


def test_two_tasks_of_one_name_have_states_of_their_own(root: Path) -> None:
    other = root / "other"
    (other / root.name).mkdir(parents=True)
    (other / root.name / "task.yaml").write_text(TASK)
    land(other / root.name / "in" / "a.parquet")
    settle(root)
    inbox = Inbox(str(other / root.name / "task.yaml"), root / "state")
    inbox.changes()
    assert inbox.changes() == [str(other / root.name / "in" / "a.parquet")]
    assert len(list((root / "state").iterdir())) == 2


def test_a_task_that_is_broken_for_a_while_loses_nothing(root: Path) -> None:
    settle(root)
    land(root / "in" / "b.parquet")
    inbox = inbox_in(root)
    inbox.changes()
    (root / "task.yaml").write_text("labels: {good")
    with pytest.raises(InputError, match="not YAML"):
        inbox.changes()
    (root / "task.yaml").write_text(TASK)
    assert names(inbox.changes()) == ["b.parquet"]


def test_files_behind_urls_are_announced_by_their_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOZELINE_CACHE", str(tmp_path / "cache"))
    storage, _ = filesystem("memory://mail")
    storage.pipe({"/mail/task.yaml": TASK.encode(), "/mail/in/a.parquet": b"a", "/mail/labelled.parquet": b"l"})
    try:
        inbox = Inbox("memory://mail/task.yaml", tmp_path / "state")
        assert inbox.changes() == []
        assert names(inbox.changes()) == ["a.parquet", "labelled.parquet"]
        inbox.acknowledge()
        assert inbox.changes() == []
        storage.pipe({"/mail/in/a.parquet": b"b"})
        assert inbox.changes() == []
        [changed] = inbox.changes()
        assert changed.startswith("memory://")
        assert changed.endswith("/mail/in/a.parquet")
        assert not (tmp_path / "cache").exists()  # nothing is fetched
    finally:
        storage.rm("/mail", recursive=True)


def test_a_state_that_cannot_be_written_is_told(root: Path) -> None:
    (root / "state").write_text("a file where a directory should be")
    with pytest.raises(InputError, match="CLOZELINE_HOME"):
        inbox_in(root).changes()


FILES = ("in/a.parquet", "in/b.parquet", "in/c.parquet", "labelled.parquet")
actions = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from(FILES)),
        st.tuples(st.just("remove"), st.sampled_from(FILES[1:])),  # one stays, for a glob without a match is an error
        st.tuples(st.just("look"), st.sampled_from(["acknowledged", "crashed"])),
    ),
    max_size=25,
)


@given(actions)
def test_whatever_happens_nothing_is_lost_and_nothing_unfinished_is_announced(happened: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "task.yaml").write_text(TASK)
        land(root / FILES[0])
        inbox = inbox_in(root)
        before: dict[str, Mark] = {}
        told: dict[str, Mark] = {}
        acknowledged: dict[str, Mark] = {}

        def look(outcome: str) -> list[str]:
            nonlocal inbox, before
            now = snapshot(Task.load(root / "task.yaml"))
            announced = inbox.changes()
            for file in announced:
                assert before[file] == now[file]
                assert acknowledged.get(file) != now[file]
                told[file] = now[file]
            before = now
            if outcome == "acknowledged":
                inbox.acknowledge()
                acknowledged.update({file: now[file] for file in announced})
                for gone in set(acknowledged) - set(now):
                    del acknowledged[gone]
            else:
                inbox = inbox_in(root)
            return announced

        for action, what in happened:
            if action == "write":
                land(root / what)
            elif action == "remove":
                (root / what).unlink(missing_ok=True)
            else:
                look(what)
        look("acknowledged")
        look("acknowledged")
        current = snapshot(Task.load(root / "task.yaml"))
        assert {file: told.get(file) for file in current} == current
        assert look("acknowledged") == []
