"""The store behind a URL, against an S3 API over HTTP: the same artifacts as on a disk, whatever is killed when."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import inventory, locations, remote_store, transfer
from pipeline.base_model import resolve_base_model
from pipeline.checks import check_task
from pipeline.errors import InputError, StorageTrouble, StoreDamaged
from pipeline.housekeeping import collect
from pipeline.plan import Plan, build_plan
from pipeline.predict import find_student
from pipeline.publishing import publish
from pipeline.remote_store import RemoteStore
from pipeline.stages import run_stage
from pipeline.store import MANIFEST, RUN, Store, key_of, open_store
from pipeline.task import Task
from pipeline.versions import newest_manifest
from tests.conftest import latest_manifest

KEY = key_of({"steps": 3})
HEADER = {"version": 1, "spec": {"steps": 3}, "inputs": {}}


@pytest.fixture
def store(s3_url: str) -> RemoteStore:
    opened = open_store(f"{s3_url}/store/")
    assert isinstance(opened, RemoteStore)
    return opened


def build(out: Path) -> Mapping[str, Any]:
    (out / "data").mkdir()
    (out / "data" / "rows.bin").write_bytes(bytes(range(256)) * 40)
    (out / "settings.json").write_text('{"a": 1}')
    return {"rows": 40}


def files_of(root: Path) -> dict[str, bytes]:
    """Every file below a directory but the record of the run."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name != RUN]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def prefix_of(store: RemoteStore) -> str:
    """Where the files of the one artifact lie."""
    content = locations.read(locations.join(store.url_of("fit", KEY), MANIFEST))
    assert content is not None
    return locations.join(store.url_of("fit", KEY), json.loads(content)["prefix"])


# ---- building and finding ------------------------------------------------------------------------------


def test_an_artifact_is_built_once_and_found_without_a_download(store: RemoteStore, tmp_path: Path) -> None:
    calls = []

    def counted(out: Path) -> Mapping[str, Any]:
        calls.append(out)
        return build(out)

    assert store.find("fit", KEY) is None
    built = store.get_or_build("fit", KEY, counted, HEADER)
    shutil.rmtree(tmp_path / "cache")
    again = open_store(store.location).get_or_build("fit", KEY, counted, HEADER)
    assert len(calls) == 1
    assert again == built
    assert again.meta == {"rows": 40}
    assert not again.path.exists()


def test_files_and_manifest_are_those_of_a_store_on_a_disk(store: RemoteStore, tmp_path: Path) -> None:
    store.get_or_build("fit", KEY, build, HEADER)
    shutil.rmtree(store.root)
    found = open_store(store.location).find("fit", KEY)
    assert found is not None
    fetched = store.fetch(found)
    on_disk = Store(tmp_path / "disk").get_or_build("fit", KEY, build, HEADER)
    assert files_of(fetched.path) == files_of(on_disk.path)
    assert fetched.manifest == on_disk.manifest
    fetched.verify()


def test_any_storage_that_fsspec_knows_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOZELINE_CACHE", str(tmp_path / "cache"))
    store = open_store(f"memory://{tmp_path.name}")
    whole = files_of(store.get_or_build("fit", KEY, build, HEADER).path)
    shutil.rmtree(store.root)
    found = store.find("fit", KEY)
    assert found is not None
    assert files_of(store.fetch(found).path) == whole


def test_a_file_url_is_a_store_on_a_disk(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    assert type(store) is Store
    assert store.location == str(tmp_path / "store")


def test_several_threads_fetch_one_artifact_at_once(store: RemoteStore) -> None:
    built = store.get_or_build("fit", KEY, build, HEADER)
    shutil.rmtree(store.root)
    with ThreadPoolExecutor(4) as pool:
        fetched = list(pool.map(store.fetch, [built] * 4))
    for artifact in fetched:
        artifact.verify()
    assert list((store.root / "tmp").iterdir()) == []


def test_a_damaged_cached_copy_is_fetched_again(store: RemoteStore) -> None:
    built = store.get_or_build("fit", KEY, build, HEADER)
    whole = files_of(built.path)
    (built.path / "settings.json").write_text("{")
    assert files_of(store.fetch(built).path) == whole


def test_a_flipped_bit_of_a_cached_copy_is_found_by_the_next_process_and_fetched_again(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = store.get_or_build("fit", KEY, build, HEADER)
    whole = files_of(store.fetch(built).path)
    monkeypatch.setattr(remote_store, "_verified", set())
    (built.path / "settings.json").write_text('{"a": 2}')
    assert files_of(store.fetch(built).path) == whole


def test_a_build_that_fails_leaves_nothing_and_can_be_tried_again(store: RemoteStore) -> None:
    def failing(out: Path) -> Mapping[str, Any]:
        build(out)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.get_or_build("fit", KEY, failing, HEADER)
    assert store.find("fit", KEY) is None
    assert list((store.root / "tmp").iterdir()) == []
    started = time.monotonic()
    assert store.get_or_build("fit", KEY, build, HEADER).meta == {"rows": 40}
    assert time.monotonic() - started < store.ttl / 2  # the failed builder gave its lease back


# ---- damage --------------------------------------------------------------------------------------------


def _remove_file(store: RemoteStore) -> None:
    locations.remove([locations.join(prefix_of(store), "settings.json")])


def _cut_file(store: RemoteStore) -> None:
    locations.write(locations.join(prefix_of(store), "data/rows.bin"), bytes(100))


def _cut_manifest(store: RemoteStore) -> None:
    manifest = locations.join(store.url_of("fit", KEY), MANIFEST)
    locations.write(manifest, (locations.read(manifest) or b"")[:50])


def _remove_manifest(store: RemoteStore) -> None:
    locations.remove([locations.join(store.url_of("fit", KEY), MANIFEST)])


@pytest.mark.parametrize("damage", [_remove_file, _cut_file, _cut_manifest, _remove_manifest])
def test_a_damaged_artifact_is_built_again_to_the_same_bytes(damage: Any, store: RemoteStore) -> None:
    whole = files_of(store.get_or_build("fit", KEY, build, HEADER).path)
    damage(store)
    assert store.find("fit", KEY) is None
    store.get_or_build("fit", KEY, build, HEADER)
    shutil.rmtree(store.root)
    found = store.find("fit", KEY)
    assert found is not None
    assert files_of(store.fetch(found).path) == whole


def test_a_flipped_bit_is_found_when_the_file_is_fetched(store: RemoteStore) -> None:
    built = store.get_or_build("fit", KEY, build, HEADER)
    locations.write(locations.join(prefix_of(store), "settings.json"), b'{"a": 2}')
    shutil.rmtree(store.root)
    with pytest.raises(StoreDamaged, match="does not match its manifest"):
        store.fetch(built)


# ---- what the user, or the storage, has to be told about -----------------------------------------------


def test_a_bucket_that_does_not_exist_is_the_users_to_fix(
    store: RemoteStore, tiny_task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="the bucket does not exist\n  in: s3://nowhere"):
        open_store("s3://nowhere/store").find("fit", KEY)
    monkeypatch.setenv("CLOZELINE_STORE", "s3://nowhere/store")
    with pytest.raises(InputError, match="the bucket does not exist"):
        check_task(Task.load(tiny_task()))


def test_missing_credentials_are_named_and_never_shown(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match="set AWS_ACCESS_KEY_ID") as told:
        store.find("fit", KEY)
    assert "testing" not in str(told.value)


def test_a_storage_that_does_not_answer_may_answer_later(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageTrouble, match="Could not connect"):
        store.find("fit", KEY)


# ---- several processes, and killed ones ----------------------------------------------------------------

BUILDER = textwrap.dedent("""\
    import os, sys, time
    from pathlib import Path
    from pipeline.store import open_store

    url, key, log = sys.argv[1], sys.argv[2], Path(sys.argv[5])
    seconds, megabytes = float(sys.argv[3]), int(sys.argv[4])

    def build(out):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(seconds)
        (out / "data").mkdir()
        for number in range(megabytes):
            (out / "data" / f"{number}.bin").write_bytes(bytes([number]) * 2**20)
        (out / "settings.json").write_text('{"a": 1}')
        return {"rows": 40}

    store = open_store(url)
    store.ttl = 1.5
    store.get_or_build("fit", key, build, {"version": 1, "spec": {"steps": 3}, "inputs": {}})
    """)


def start_builder(store: RemoteStore, log: Path, cache: Path, *, seconds: float = 0, megabytes: int = 2) -> Any:
    command = [sys.executable, "-c", BUILDER, store.location, KEY, str(seconds), str(megabytes), str(log)]
    return subprocess.Popen(command, env={**os.environ, "CLOZELINE_CACHE": str(cache)})


def undisturbed(tmp_path: Path, megabytes: int) -> dict[str, bytes]:
    def build_here(out: Path) -> Mapping[str, Any]:
        (out / "data").mkdir()
        for number in range(megabytes):
            (out / "data" / f"{number}.bin").write_bytes(bytes([number]) * 2**20)
        (out / "settings.json").write_text('{"a": 1}')
        return {"rows": 40}

    return files_of(Store(tmp_path / "undisturbed").get_or_build("fit", KEY, build_here, HEADER).path)


def fetched(store: RemoteStore) -> dict[str, bytes]:
    found = store.find("fit", KEY)
    assert found is not None
    return files_of(store.fetch(found).path)


def test_several_machines_build_a_key_once(store: RemoteStore, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start_builder(store, log, tmp_path / f"machine-{i}", seconds=0.5) for i in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(log.read_text().split()) == 1
    assert fetched(store) == undisturbed(tmp_path, 2)


def test_of_two_machines_that_both_build_one_wins_and_both_use_it(store: RemoteStore) -> None:
    def build_beside(out: Path) -> Mapping[str, Any]:
        # Another machine believes that this one is dead, and is faster.
        other = open_store(store.location)
        assert isinstance(other, RemoteStore)
        other.root = store.root.with_name("other-machine")
        [link] = locations.entries(locations.join(store.location, "leases", f"fit-{KEY}"))
        held = locations.join(store.location, "leases", f"fit-{KEY}", link)
        locations.write(held, (locations.read(held) or b"").replace(b'"released": false', b'"released": true'))
        winners.append(other.get_or_build("fit", KEY, build, HEADER))
        return build(out)

    winners: list[Any] = []
    mine = store.get_or_build("fit", KEY, build_beside, HEADER)
    assert mine.path.name == winners[0].path.name
    assert len(locations.entries(store.url_of("fit", KEY))) == 2 * 2 + 1  # two uploads, one manifest


@pytest.mark.parametrize("moment", ["build", "upload"])
def test_after_a_kill_the_same_call_finishes_with_the_same_bytes_and_the_litter_is_swept(
    moment: str, store: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, cache = tmp_path / "log", tmp_path / "machine"
    process = start_builder(store, log, cache, seconds=600 if moment == "build" else 0, megabytes=40)
    artifact = store.url_of("fit", KEY)
    while not (log.exists() if moment == "build" else locations.entries(artifact)):
        assert process.poll() is None, "the builder ended too early"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    uploaded = locations.entries(artifact)
    assert MANIFEST not in uploaded
    assert len(uploaded) < 41
    assert store.find("fit", KEY) is None

    assert start_builder(store, log, cache, megabytes=40).wait(60) == 0
    assert len(log.read_text().split()) == 2
    assert fetched(store) == undisturbed(tmp_path, 40)
    assert list((cache / "stores").glob("*/tmp/*")) == []
    if moment == "upload":
        with store.using([("fit", KEY)], {}):
            assert collect(store, keep=1).litter == []  # so young an upload may belong to a builder that is at it
            monkeypatch.setattr(inventory, "_UPLOAD_SECONDS", -1.0)
            [litter] = [one for one in collect(store, keep=1).litter if one.name.startswith("fit/")]
        assert litter.why == "an upload that was never published"
        assert len(locations.entries(artifact)) == 41 + 1
        assert fetched(store) == undisturbed(tmp_path, 40)


def test_a_stage_whose_input_another_has_discarded_says_that_it_is_to_be_built_again(
    store: RemoteStore, tiny_task: Callable[..., Path]
) -> None:
    task = Task.load(tiny_task())
    [prepare] = build_plan(task, resolve_base_model(task.base_model, task.root)).find("prepare")
    with pytest.raises(StoreDamaged, match=r"needs ingest/.*may have found it damaged"):
        run_stage(prepare.request(store))


# ---- the main job --------------------------------------------------------------------------------------


class Run:
    """A task run stage by stage, its store and its releases at the given locations."""

    def __init__(self, task: str, store: str, out: str) -> None:
        self.task, self.store, self.out = task, open_store(store), out

    def plan(self) -> Plan:
        task = Task.load(self.task)
        check_task(task)
        return build_plan(task, resolve_base_model(task.base_model, task.root), newest_manifest(self.out))

    def __call__(self) -> list[str]:
        """Run and publish; returns the titles of the stages that were executed."""
        results = [(call.title, *run_stage(call.request(self.store))) for call in self.plan().calls]
        self.published = publish(self.store.fetch(results[-1][1]), self.out)
        return [title for title, _, built in results if built]


def test_the_main_job_behind_urls_gives_the_bytes_that_it_gives_on_a_disk(
    tiny_task: Callable[..., Path], s3_url: str, tmp_path: Path
) -> None:
    path = tiny_task(changes={"name": "tiny", "inputs": {"unlabelled": "pool/day=*/part.parquet"}})
    for day in ("1", "2"):
        part = path.parent / "pool" / f"day={day}" / "part.parquet"
        part.parent.mkdir(parents=True)
        shutil.copy(path.parent / ("unlabelled.parquet" if day == "1" else "test.parquet"), part)
    names = [str(file.relative_to(path.parent)) for file in path.parent.rglob("*") if file.is_file()]
    transfer.upload_tree(path.parent, names, f"{s3_url}/tasks")
    model = Path(Task.load(path).base_model)
    transfer.upload_tree(model, [file.name for file in model.iterdir()], f"{s3_url}/models/{model.name}")
    behind = (locations.read(f"{s3_url}/tasks/task.yaml") or b"").replace(
        str(model).encode(), f"../models/{model.name}".encode()
    )
    locations.write(f"{s3_url}/tasks/task.yaml", behind)

    here = Run(str(path), str(tmp_path / "store"), str(tmp_path / "releases"))
    there = Run(f"{s3_url}/tasks/task.yaml", f"{s3_url}/store", f"{s3_url}/releases")
    executed = here()
    assert there() == executed
    fit = there.plan().find("fit")[0].request(there.store)
    assert fit["where"]["base"] == f"{s3_url}/models/{model.name}"
    there.store.discard(fit["stage"], fit["key"])
    shutil.rmtree(tmp_path / "cache")  # another machine
    assert run_stage(fit)[1]
    assert len(executed) > 15
    assert there.published.name == here.published.name
    version = Path(here.published.path)
    on_disk = files_of(version)
    published = {
        name: locations.read(f"{there.published.path}/{name}") for name in locations.entries(there.published.path)
    }
    assert published == on_disk
    assert latest_manifest(there.out) == latest_manifest(here.out)
    assert files_of(find_student(there.out)) == files_of(version / "model")

    shutil.rmtree(tmp_path / "cache")  # a second machine, or a cleaned one
    assert there() == []
    assert not there.published.new
