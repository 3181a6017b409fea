"""Housekeeping: what nothing needs goes, and nothing that is needed goes with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline import housekeeping, inventory, locations
from pipeline.errors import InputError, StorageTrouble
from pipeline.housekeeping import collect, disk_use, list_artifacts, plan_gc
from pipeline.leases import lease, locked
from pipeline.locations import below, write_file
from pipeline.remote_store import RemoteStore
from pipeline.store import Store, key_of, open_store
from pipeline.versions import SUCCESS, VERSIONS, hold, promote, put_in_force, rollback

Reference = tuple[str, str]


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return open_store(tmp_path / "store")
    return open_store(str(request.getfixturevalue("s3_url")))


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def add(store: Store, stage: str, name: object, size: int = 100) -> Reference:
    """Build an artifact of one file."""

    def build(out: Path) -> Mapping[str, Any]:
        (out / "file.bin").write_bytes(bytes(size))
        return {}

    artifact = store.get_or_build(stage, key_of(name), build, {"version": 1})
    return stage, artifact.key


def there(store: Store, *references: Reference) -> list[bool]:
    return [store.find(*reference) is not None for reference in references]


def goes(found: housekeeping.Collection) -> set[Reference]:
    return {stored.reference for stored in found.goes}


def reasons(found: housekeeping.Collection) -> dict[Reference, str]:
    return {stored.reference: why for stored, why in found.stays}


USER = textwrap.dedent("""\
    import sys
    from pipeline.store import open_store

    with open_store(sys.argv[1]).using([(sys.argv[2], sys.argv[3])], {"run": "nightly"}):
        print("using", flush=True)
        sys.stdin.read()
    """)


@pytest.fixture
def start_user() -> Iterator[Callable[[Store, Reference], subprocess.Popen[str]]]:
    """Start a process that uses an artifact until its input ends."""
    started = []

    def start(store: Store, reference: Reference) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", USER, store.location, *reference],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "using\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_artifacts_are_listed_with_their_sizes_oldest_first(store: Store) -> None:
    before = time.time()
    one = add(store, "ingest", 1, 1000)
    time.sleep(1.1)  # the server counts whole seconds
    two = add(store, "fit", 2, 5000)
    listed = list_artifacts(store)
    assert [stored.reference for stored in listed] == [one, two]
    assert 1000 < listed[0].bytes < 2000
    assert all(abs(stored.created - before) < 60 and not stored.in_use for stored in listed)
    assert list(disk_use(store)) == ["fit", "ingest"]
    assert 5000 < disk_use(store)["fit"] < 7000


def test_what_nothing_needs_goes_and_a_dry_run_takes_nothing(store: Store) -> None:
    kept, gone = add(store, "fit", "kept"), add(store, "fit", "gone")
    store.record_release("tickets", "/releases/tickets", "0001-aa", [kept])
    planned = plan_gc(store, keep=3)
    assert goes(planned) == {gone}
    assert reasons(planned) == {kept: "released: 0001-aa at /releases/tickets"}
    assert planned.bytes > 100
    assert there(store, kept, gone) == [True, True]

    assert goes(collect(store, keep=3)) == {gone}
    assert there(store, kept, gone) == [True, False]
    assert goes(collect(store, keep=3)) == set()
    assert add(store, "fit", "gone") == gone  # and it can be built again
    assert there(store, gone) == [True]


def test_looking_writes_nothing(disk: Store) -> None:
    assert list_artifacts(disk) == []
    assert not disk.root.exists()
    with disk.using([add(disk, "fit", "one")], {}):
        before = {path: path.stat().st_mtime_ns for path in disk.root.rglob("*")}
        list_artifacts(disk)
        plan_gc(disk, keep=1)
        assert {path: path.stat().st_mtime_ns for path in disk.root.rglob("*")} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_store_that_cannot_be_written_can_be_looked_at(disk: Store) -> None:
    with disk.using([add(disk, "fit", "one")], {}):
        paths = [disk.root, *disk.root.rglob("*")]
        modes = {path: path.stat().st_mode for path in paths}
        for path in paths:
            path.chmod(modes[path] & ~0o222)
        try:
            assert [stored.in_use for stored in list_artifacts(disk)] == [True]
            assert goes(plan_gc(disk, keep=0)) == set()
        finally:
            for path in paths:
                path.chmod(modes[path])


def test_nothing_goes_where_the_storage_does_not_tell_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOZELINE_CACHE", str(tmp_path / "cache"))
    store = open_store(f"memory://{tmp_path.name}")
    reference = add(store, "fit", "one")
    for file in locations.filesystem(store.location)[0].store.values():
        file.created = datetime.fromtimestamp(0, UTC)  # what a storage that tells no time comes to
    with pytest.raises(InputError, match="does not tell when files were written"):
        collect(store, keep=0)
    assert there(store, reference) == [True]


def test_the_last_versions_of_each_release_keep_what_they_were_made_of(store: Store) -> None:
    old, shared, new, other = (add(store, "fit", name) for name in ("old", "shared", "new", "other"))
    store.record_release("tickets", "/releases/a", "0001-aa", [old, shared])
    store.record_release("tickets", "/releases/b", "0001-bb", [other])  # another path has versions of its own
    store.record_release("tickets", "/releases/a", "0002-cc", [shared, new])
    store.record_release("tickets", "/releases/a", "0002-cc", [shared, new])  # unchanged the next night
    assert goes(plan_gc(store, keep=2)) == set()  # two versions, though three records
    found = collect(store, keep=1)
    assert goes(found) == {old}
    assert there(store, old, shared, new, other) == [False, True, True, True]
    assert [litter.why for litter in found.litter if litter.name.startswith("released/")] == [
        "the record of an older release"
    ] * 2
    assert goes(collect(store, keep=0)) == {shared, new, other}


def publish(release: str, store: Store, number: int, *, held: bool = False) -> Reference:
    """A version of one artifact, recorded as a run does, in force or held; gives the artifact."""
    name = f"{number:04d}-{number:08x}"
    write_file(below(release, VERSIONS, name, SUCCESS), "")
    if held:
        hold(release, name, ["looks worse"])
    else:
        put_in_force(release, name, lambda: None)
    made = add(store, "fit", number)
    store.record_release("tickets", release, name, [made])
    return made


def test_a_held_version_keeps_what_it_was_made_of_and_none_that_was_in_force_goes_for_it(
    disk: Store, release: str
) -> None:
    old, good, last = (publish(release, disk, number) for number in (1, 2, 3))
    held = [publish(release, disk, number, held=True) for number in (4, 5, 6)]
    found = collect(disk, keep=2)
    assert goes(found) == {old}
    assert reasons(found)[held[0]] == f"held: 0004-00000004 at {release}"
    assert reasons(found)[last] == f"released: 0003-00000003 at {release}"
    assert there(disk, good, last, *held) == [True] * 5
    assert goes(plan_gc(disk, keep=0)) == {good, last}


def test_a_version_that_is_promoted_counts_again(disk: Store, release: str) -> None:
    made = [publish(release, disk, number, held=number == 2) for number in (1, 2, 3)]
    assert goes(plan_gc(disk, keep=2)) == set()
    promote(release, "2")
    assert goes(plan_gc(disk, keep=2)) == {made[0]}


def test_a_version_that_was_rolled_back_is_held_and_the_one_in_force_counts_first(disk: Store, release: str) -> None:
    first, second, third = (publish(release, disk, number) for number in (1, 2, 3))
    rollback(release, "1")
    found = plan_gc(disk, keep=1)
    assert goes(found) == {second}
    assert {reference: why.split(":")[0] for reference, why in reasons(found).items()} == {
        first: "released",
        third: "held",
    }


def test_the_record_of_a_version_that_was_removed_holds_nothing(disk: Store, tmp_path: Path) -> None:
    release = str(tmp_path / "releases")
    publish(release, disk, 1)
    gone = publish(release, disk, 2, held=True)
    publish(release, disk, 3)
    shutil.rmtree(Path(release, VERSIONS, "0002-00000002"))
    assert gone in goes(plan_gc(disk, keep=1))


@pytest.mark.parametrize("trouble", ["gone", "no storage", "no answer"])
def test_where_a_release_path_cannot_be_read_all_its_versions_count(
    trouble: str, disk: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = str(tmp_path / "releases")
    made = [publish(release, disk, number, held=number == 2) for number in (1, 2)]
    if trouble == "gone":
        shutil.rmtree(release)
    elif trouble == "no storage":
        release = "nothing-of-the-kind://releases"
        for number in (1, 2):
            disk.record_release("tickets", release, f"000{number}-aaaaaaaa", [made[number - 1]])
        shutil.rmtree(tmp_path / "releases")
    else:

        def no_answer(release: str) -> None:
            raise StorageTrouble("no answer")

        monkeypatch.setattr(inventory, "whole_versions", no_answer)
    assert goes(plan_gc(disk, keep=1)) == {made[0]}


def test_what_a_running_process_uses_stays(
    store: Store, start_user: Callable[[Store, Reference], subprocess.Popen[str]]
) -> None:
    used, unused = add(store, "fit", "used"), add(store, "fit", "unused")
    process = start_user(store, used)
    assert {stored.reference: stored.in_use for stored in list_artifacts(store)} == {used: True, unused: False}
    found = collect(store, keep=1)
    assert goes(found) == {unused}
    assert reasons(found)[used].startswith(f"in use: nightly, process {process.pid} on ")
    process.communicate("")
    assert process.returncode == 0
    assert goes(collect(store, keep=1)) == {used}


def test_what_a_killed_process_used_stays_for_a_week(
    store: Store,
    start_user: Callable[[Store, Reference], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = add(store, "fit", "used")
    process = start_user(store, used)
    process.kill()
    process.wait()
    monkeypatch.setattr(inventory, "USE_SECONDS", -1.0)  # behind a URL a dead holder is one whose heartbeat is old
    found = collect(store, keep=1)
    assert reasons(found)[used].startswith("named by work that did not finish, ")
    assert not list_artifacts(store)[0].in_use
    assert there(store, used) == [True]
    monkeypatch.setattr(housekeeping, "_UNFINISHED_DAYS", -1)
    found = collect(store, keep=1)
    assert goes(found) == {used}
    assert "work that ended without a word long ago" in [litter.why for litter in found.litter]
    assert plan_gc(store, keep=1).litter == []


def test_what_failing_work_had_done_stays_for_its_next_try(store: Store) -> None:
    done = add(store, "fit", "done")
    with pytest.raises(RuntimeError), store.using([done], {}):
        raise RuntimeError("out of memory")
    assert goes(collect(store, keep=1)) == set()
    assert there(store, done) == [True]


def test_work_that_registers_waits_for_a_collection_and_then_finds_what_is_there(store: Store) -> None:
    reference = add(store, "fit", "wanted")
    found: list[bool] = []

    def work() -> None:
        with store.using([reference], {}):
            found.extend(there(store, reference))

    if isinstance(store, RemoteStore):
        collecting = lease(locations.join(store.location, "leases", "gc"), ttl=5)
    else:
        collecting = locked(store.root / "locks" / "gc")  # type: ignore[assignment]
    thread = threading.Thread(target=work)
    with collecting:
        thread.start()
        time.sleep(0.5)
        assert found == []
    thread.join(10)
    assert found == [True]


def test_an_artifact_that_is_being_built_stays(store: Store) -> None:
    reference = add(store, "fit", "one")
    if isinstance(store, RemoteStore):
        building = lease(locations.join(store.location, "leases", "-".join(reference)), ttl=5)
    else:
        building = locked(store.root / "locks" / "-".join(reference))  # type: ignore[assignment]
    with building:
        assert reasons(collect(store, keep=1)) == {reference: "being built"}
    assert goes(collect(store, keep=1)) == {reference}


def test_a_dead_builders_work_is_swept_and_a_living_ones_is_not(disk: Store) -> None:
    dead, living = (disk.root / "tmp" / f"fit-{key_of(name)}-12345678" for name in ("dead", "living"))
    for path in (dead, living):
        path.mkdir(parents=True)
        (path / "file.bin").write_bytes(bytes(70))
    half_removed = disk.root / "tmp" / "gc-0123"
    half_removed.mkdir()
    foreign = disk.root / "prefect" / "results" / "entry"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    with locked(disk.root / "locks" / f"fit-{key_of('living')}"):
        found = collect(disk, keep=1)
    assert {litter.name: litter.bytes for litter in found.litter if litter.bytes} == {f"tmp/{dead.name}": 70}
    assert [dead.exists(), living.exists(), half_removed.exists(), foreign.exists()] == [False, True, False, True]


def test_work_that_was_killed_before_it_had_registered_leaves_nothing_for_long(disk: Store) -> None:
    with disk.using([], {}):
        pass
    young, old = (disk.root / "uses" / f".{name}.json" for name in ("young", "old"))
    young.touch()
    old.touch()
    os.utime(old, (0, 0))
    collect(disk, keep=1)
    assert [young.exists(), old.exists()] == [True, False]


def test_an_artifact_without_a_manifest_is_litter(disk: Store) -> None:
    reference = add(disk, "fit", "one")
    (disk.path_of(*reference) / "manifest.json").unlink()
    [litter] = [one for one in collect(disk, keep=1).litter if not one.name.startswith("locks/")]
    assert litter.why == "an artifact without a manifest"
    assert not disk.path_of(*reference).exists()


def test_locks_and_leases_that_nobody_holds_are_swept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store, "fit", "one")
    monkeypatch.setattr(inventory, "_UPLOAD_SECONDS", -1.0)
    collect(store, keep=0)
    if isinstance(store, RemoteStore):
        left = {name for name in locations.entries(store.location) if "fit" in name}
    else:
        left = {path.name for path in store.root.rglob("*") if path.is_file() and "fit" in path.name}
    assert left == set()


def test_a_use_is_seen_whole_and_gone_at_its_end(disk: Store) -> None:
    with disk.using([("fit", "0" * 32), ("fit", "0" * 32)], {"run": "one"}):
        [path] = (disk.root / "uses").iterdir()
        record = json.loads(path.read_text())
        assert record["references"] == [["fit", "0" * 32]]
        assert record["about"] == {"run": "one"}
        assert f"process {os.getpid()} on " in record["holder"]
    assert list((disk.root / "uses").iterdir()) == []
