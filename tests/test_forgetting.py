"""Forgetting rows: gone from versions, store and copies, on a disk and behind URLs, and never labelled again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from pipeline import forgetting, locations, release
from pipeline.errors import InputError
from pipeline.forgetting import Forgetting, forget, plan_forgetting
from pipeline.locations import below, read_file, write_file
from pipeline.plan import Plan, plan_run
from pipeline.publishing import publish
from pipeline.settings import Settings
from pipeline.stages import run_stage
from pipeline.store import Store, open_store
from pipeline.tables import opened
from pipeline.task import Task
from pipeline.transfer import fetch_tree
from pipeline.versions import Forgotten, list_versions, read_forgotten, write_forgotten


class World:
    """A task run stage by stage in this process, with its store and its release."""

    def __init__(self, path: Path, root: str) -> None:
        self.path, self.release, self.store = path, f"{root}/releases", open_store(f"{root}/store")

    def plan(self, *overrides: str) -> Plan:
        return plan_run(Task.load(self.path, overrides), self.release)

    def run(self, *overrides: str) -> str:
        """Run and publish; returns the version's path or URL."""
        plan = self.plan(*overrides)
        for call in plan.calls:
            artifact, _ = run_stage(call.request(self.store))
        self.last = plan
        return publish(self.store.fetch(artifact), self.release).path

    def rows(self, split: str, version: str) -> list[dict[str, Any]]:
        with opened(below(version, "data", f"{split}-00000-of-00001.parquet")) as file:
            return list(file.read().to_pylist())

    def text_of(self, row_id: str) -> str:
        table = pq.read_table(self.path.parent / f"{row_id.rsplit('-', 1)[0]}.parquet").to_pylist()
        return next(str(row["text"]) for row in table if row["key"] == row_id)

    def where(self, text: str) -> set[str]:
        """What of ours holds a text: files of the release, of the store and of this machine's cache."""
        cache = Settings().cache_path
        places = [self.release, self.store.location, *([str(cache)] if cache.exists() else [])]
        return {place + "/" + name for place in places for name, held in _contents(place) if text in held}


def _contents(place: str) -> Iterator[tuple[str, str]]:
    """Every file below a place, as text: Parquet unpacked."""
    here = locations.local_path(place)
    root = Path(place) if here is not None else fetch_tree(place, Path(Settings().cache_path.parent, "look"))
    for file in sorted(root.rglob("*")) if root is not None else ():
        if file.suffix == ".parquet":
            yield str(file.relative_to(root)), json.dumps(pq.read_table(file).to_pylist(), ensure_ascii=False)
        elif file.is_file() and file.suffix != ".safetensors":
            yield str(file.relative_to(root)), file.read_text(encoding="utf-8", errors="replace")


@pytest.fixture(params=["disk", "s3"])
def world(
    request: pytest.FixtureRequest, tiny_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    monkeypatch.setenv("CLOZELINE_HOME", str(tmp_path))
    root = str(tmp_path / "ours") if request.param == "disk" else str(request.getfixturevalue("s3_url"))
    return World(tiny_task(), root)


@pytest.fixture
def disk(tiny_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("CLOZELINE_HOME", str(tmp_path))
    return World(tiny_task(), str(tmp_path / "ours"))


def test_a_forgotten_row_is_gone_from_all_that_is_ours_and_stays_out(world: World) -> None:
    first, second = world.run(), world.run("release.review_budget=3")
    row_id = world.rows("review", second)[0]["row_id"]
    text = world.text_of(row_id)
    before = world.where(text)
    assert {name.rsplit("/", 1)[-1] for name in before} >= {"rows.parquet", "label_studio.json", "doccano.jsonl"}

    planned = plan_forgetting(world.release, [row_id], world.store)
    assert world.where(text) == before  # looking changes nothing
    assert planned.versions == {first.rsplit("/", 1)[-1]: 1, second.rsplit("/", 1)[-1]: 1}
    assert {stored.stage for stored in planned.artifacts} == {"ingest", "sample", "route", "release"}
    assert planned.sources == [str(world.path.parent / "unlabelled.parquet")]
    assert read_forgotten(world.release) == Forgotten()

    assert forget(world.release, [row_id], world.store) == planned
    assert world.where(text) == set()
    assert read_forgotten(world.release) == Forgotten(planned.all_contents)
    for version, review in ((first, 4), (second, 2)):
        manifest = json.loads(_read(version, "manifest.json"))
        assert manifest["rows"] == {"review": review, "rest": manifest["rows"]["rest"], "train": 8}
        for name, entry in manifest["files"].items():
            content = _read(version, name)
            assert len(content) == entry["bytes"]
            assert _sha256(content) == entry["sha256"]
        assert len(json.loads(_read(version, "exports/label_studio.json"))) == review
        assert len(_read(version, "exports/doccano.jsonl").decode().splitlines()) == review

    third = world.run()
    ids = {row["row_id"] for split in ("review", "rest") for row in world.rows(split, third)}
    assert len(ids) == 23
    assert row_id not in ids
    [sample] = world.last.find("sample")
    found = world.store.find(sample.stage, sample.key)
    assert found is not None
    assert found.meta["rows"] == 23
    [prepare] = world.last.find("prepare")
    prepared = world.store.find(prepare.stage, prepare.key)
    assert prepared is not None
    assert prepared.meta["forgotten_in_pool"] == 1
    assert [version.rows["rest"] for version in list_versions(world.release)] == [19, 21, 18]


def _read(version: str, name: str) -> bytes:
    return read_file(below(version, name)) or b""


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_rewritten_files_keep_schema_and_row_groups(disk: World) -> None:
    version = Path(disk.run())
    review, rest = disk.rows("review", str(version)), disk.rows("rest", str(version))
    files = {name: version / "data" / f"{name}-00000-of-00001.parquet" for name in ("review", "rest")}
    before = {name: (pq.read_schema(file), pq.read_metadata(file)) for name, file in files.items()}
    forget(disk.release, [review[0]["row_id"], rest[3]["row_id"]], disk.store)
    for name, (schema, metadata) in before.items():
        assert pq.read_schema(files[name]).equals(schema, check_metadata=True)
        after = pq.read_metadata(files[name])
        column = after.row_group(0).column(0)
        assert after.num_rows == metadata.num_rows - 1
        assert after.num_row_groups == metadata.num_row_groups
        assert (column.compression, column.has_column_index) == ("ZSTD", True)
    assert disk.rows("rest", str(version)) == rest[:3] + rest[4:]
    assert not list(version.glob(".forgetting"))


def loaded(version: str, cache: Path) -> dict[str, int]:
    """The rows of each split, as `datasets` loads a version."""
    here = locations.local_path(version) or fetch_tree(version, cache / "trees")
    return {split: len(rows) for split, rows in load_dataset(str(here), cache_dir=str(cache)).items()}


def test_a_split_that_loses_its_last_row_goes_and_the_version_loads_without_it(world: World, tmp_path: Path) -> None:
    version = world.run("release.review_budget=1")
    [review] = world.rows("review", version)
    forget(world.release, [review["row_id"]], world.store)
    assert loaded(version, tmp_path / "loaded") == {"rest": 23, "train": 8}
    manifest = json.loads(_read(version, "manifest.json"))
    assert manifest["rows"] == {"rest": 23, "train": 8}
    assert "data/review-00000-of-00001.parquet" not in manifest["files"]
    assert manifest["files"]["README.md"]["sha256"] == _sha256(_read(version, "README.md"))
    assert read_file(below(version, "data", "review-00000-of-00001.parquet")) is None
    assert world.where(world.text_of(review["row_id"])) == set()


def test_a_file_that_becomes_empty_beside_others_of_its_split_stays(
    disk: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "ROWS_PER_FILE", 7)
    version = Path(disk.run())
    first, *others = sorted(version.glob("data/rest-*.parquet"))
    forget(disk.release, pq.read_table(first).column("row_id").to_pylist(), disk.store)
    assert [pq.read_metadata(file).num_rows for file in (first, *others)] == [0, 7, 5]
    assert loaded(str(version), tmp_path / "loaded") == {"review": 5, "rest": 12, "train": 8}


class Killed(BaseException):
    """The end of a process, as far as what it leaves goes."""


def test_a_command_that_was_killed_at_any_moment_is_finished_by_the_same_command(
    disk: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.run("release.review_budget=1")
    [version] = list_versions(disk.release)
    data = ("versions", version.name, "data")
    [review] = pq.read_table(below(disk.release, *data, "review-00000-of-00001.parquet")).to_pylist()
    rest = pq.read_table(below(disk.release, *data, "rest-00000-of-00001.parquet")).to_pylist()
    rows = [review["row_id"], rest[2]["row_id"]]

    def forget_in(name: str, steps: int) -> bool:
        """Forget in a copy of the release, killed before one of its writes; gives whether there were as many."""
        copy = str(tmp_path / name)
        shutil.copytree(disk.release, copy)
        left = iter(range(steps))

        def until_killed(work: Callable[..., Any]) -> Callable[..., Any]:
            def step(*given: Any) -> Any:
                if next(left, None) is None:
                    raise Killed
                return work(*given)

            return step

        with monkeypatch.context() as patch:
            for function in ("write_forgotten", "write_file", "remove_file", "discard_texts", "_discard_copies"):
                patch.setattr(forgetting, function, until_killed(getattr(forgetting, function)))
            patch.setattr(forgetting, "os", SimpleNamespace(replace=until_killed(os.replace)))
            with suppress(Killed):
                forget(copy, rows, disk.store)
                return False
        forget(copy, rows, disk.store)
        return True

    assert not forget_in("undisturbed", 1000)
    undisturbed = _files(tmp_path / "undisturbed")
    steps = 0
    while forget_in(f"killed-{steps}", steps):
        assert _files(tmp_path / f"killed-{steps}") == undisturbed
        steps += 1
    # The list twice, the manifest twice, the card, rest, two exports, the removed file, store and copies.
    assert steps == 11


def _files(root: Path) -> dict[str, bytes]:
    """Every file below a directory; what tells who held a lock, and since when, left out."""
    files = [file for file in root.rglob("*") if file.is_file() and file.suffix != ".lock" and file.name != ".lock"]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def test_every_row_with_the_same_text_goes(disk: World) -> None:
    rows = pq.read_table(disk.path.parent / "unlabelled.parquet").to_pylist()
    rows[7]["text"] = rows[2]["text"]
    pq.write_table(pa.Table.from_pylist(rows), disk.path.parent / "unlabelled.parquet")
    version = disk.run()
    forget(disk.release, ["unlabelled-2"], disk.store)
    left = {row["row_id"] for split in ("review", "rest") for row in disk.rows(split, version)}
    assert left == {f"unlabelled-{i}" for i in range(24) if i not in {2, 7}}


def test_an_unknown_row_is_named_and_nothing_is_changed(world: World) -> None:
    world.run()
    text = world.text_of("unlabelled-1")
    before = world.where(text)
    for work in (plan_forgetting, forget):
        with pytest.raises(InputError, match=r"no version has a row 'nobody'; nothing was changed") as caught:
            work(world.release, ["unlabelled-1", "nobody"], world.store)
        assert world.release in str(caught.value)
    assert world.where(text) == before
    assert read_forgotten(world.release) == Forgotten()
    with pytest.raises(InputError, match="there is no version here"):
        forget(world.release + "/elsewhere", ["unlabelled-1"], world.store)


def test_a_file_that_cannot_be_read_is_told_as_that_and_nothing_is_changed(world: World) -> None:
    version = world.run()
    names = ("manifest.json", "data/rest-00000-of-00001.parquet", "data/review-00000-of-00001.parquet")
    before = [_read(version, name) for name in names]
    damaged = below(version, "data", "train-00000-of-00001.parquet")
    write_file(damaged, "no Parquet")
    for work in (plan_forgetting, forget):
        with pytest.raises(InputError, match="can't read a file of the version: ") as caught:
            work(world.release, ["unlabelled-1"], world.store)
        assert damaged in str(caught.value)
    assert [_read(version, name) for name in names] == before
    assert read_forgotten(world.release) == Forgotten()


@pytest.mark.parametrize("reader", ["holds_content", "opened", "read_file"])
def test_a_disk_that_fails_while_a_version_is_rewritten_is_told_as_reading(
    reader: str, disk: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.run()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def plan(*given: Any) -> Forgetting:
        found = plan_forgetting(*given)
        monkeypatch.setattr(forgetting, reader, fail)
        return found

    monkeypatch.setattr(forgetting, "plan_forgetting", plan)
    with pytest.raises(InputError, match=r"can't read a file of the version: .*Input/output error"):
        forget(disk.release, ["unlabelled-1"], disk.store)


def test_a_command_that_was_killed_is_finished_by_the_same_command(disk: World) -> None:
    first = Path(disk.run())
    second = Path(disk.run("release.review_budget=3"))
    row_id = disk.rows("review", str(second))[0]["row_id"]
    old = {file: file.read_bytes() for version in (first, second) for file in version.rglob("*") if file.is_file()}
    done = forget(disk.release, [row_id], disk.store)
    new = {file: file.read_bytes() for file in old}
    # Killed behind the manifest of the second version, with the first one done.
    for file in old:
        if file.is_relative_to(second) and file.name != "manifest.json":
            file.write_bytes(old[file])
    (second / ".forgetting" / "data").mkdir(parents=True)
    (second / ".forgetting" / "data" / "half.parquet").write_bytes(b"half")
    write_forgotten(disk.release, Forgotten(done.all_contents, done.contents, done.sources))
    again = forget(disk.release, [row_id], disk.store)
    assert (again.contents, again.sources) == (done.contents, done.sources)
    assert {file: file.read_bytes() for file in old} == new
    assert disk.where(disk.text_of(row_id)) == set()
    # Killed behind the last version: no version has the row any more, and the command is known all the same.
    write_forgotten(disk.release, Forgotten(done.all_contents, done.contents, done.sources))
    assert forget(disk.release, [row_id], disk.store).versions == {}
    assert read_forgotten(disk.release) == Forgotten(done.all_contents)


@pytest.mark.parametrize("name", ["labelled", "test"])
def test_a_run_refuses_a_labelled_or_test_row_with_a_forgotten_text(name: str, disk: World) -> None:
    rows = pq.read_table(disk.path.parent / f"{name}.parquet").to_pylist()
    pool = pq.read_table(disk.path.parent / "unlabelled.parquet").to_pylist()
    disk.run()
    forget(disk.release, ["unlabelled-4"], disk.store)
    rows[3]["text"] = pool[4]["text"]
    pq.write_table(pa.Table.from_pylist(rows), disk.path.parent / f"{name}.parquet")
    with pytest.raises(
        InputError, match=rf"1 {name} rows hold a text that was forgotten: 3 .*\n.*inputs.{name}\n.*fix"
    ):
        disk.run()


def test_nothing_forgotten_leaves_every_key_as_it_was_and_a_forgotten_row_changes_no_labels_key(disk: World) -> None:
    disk.run()
    before = {call.title: call.key for call in disk.plan().calls}
    write_forgotten(disk.release, Forgotten())
    assert {call.title: call.key for call in disk.plan().calls} == before
    write_forgotten(disk.release, Forgotten(["0" * 16]))
    after = {call.title: call.key for call in disk.plan().calls}
    assert {title.split()[0] for title in before if before[title] == after[title]} == {"ingest"}


def test_a_list_of_forgotten_texts_that_cannot_be_read_stops_the_plan(disk: World) -> None:
    disk.run()
    Path(disk.release, "forgotten.json").write_text("{")
    with pytest.raises(InputError, match="can't read what was forgotten"):
        disk.plan()


def test_copies_of_files_behind_urls_are_removed_from_this_machine(
    s3_url: str, tiny_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOZELINE_HOME", str(tmp_path))
    path = tiny_task()
    locations.write(f"{s3_url}/pool.parquet", (path.parent / "unlabelled.parquet").read_bytes())
    world = World(path, s3_url)
    world.run(f"inputs.unlabelled={s3_url}/pool.parquet")
    copies = Settings().cache_path
    assert list(copies.rglob("pool.parquet"))
    found = forget(world.release, ["unlabelled-0"], world.store)
    assert found.sources == [f"{s3_url}/pool.parquet"]
    assert not list(copies.rglob("pool.parquet"))
    assert world.where(world.text_of("unlabelled-0")) == set()


def test_what_killed_builders_left_of_a_store_behind_a_url_goes_too(
    s3_url: str, tiny_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOZELINE_HOME", str(tmp_path))
    world = World(tiny_task(), s3_url)
    world.run()
    text = world.text_of("unlabelled-0")
    [ingest] = [call for call in world.last.calls if call.title == "ingest unlabelled.parquet"]
    artifact = world.store.find("ingest", ingest.key)
    assert artifact is not None
    killed = world.store.root / "tmp" / f"ingest-{'0' * 32}-01234567"  # of a key that nobody will build again
    shutil.copytree(artifact.path, killed)
    locations.write(f"{s3_url}/store/ingest/{'0' * 32}/prefix/rows.parquet", (killed / "rows.parquet").read_bytes())
    forget(world.release, ["unlabelled-0"], world.store)
    assert world.where(text) == set()


def test_a_store_elsewhere_is_left_alone(disk: World, tmp_path: Path) -> None:
    disk.run()
    other = Store(tmp_path / "other")
    assert plan_forgetting(disk.release, ["unlabelled-0"], other).artifacts == []
    assert not other.root.exists()
