"""Publishing: whole versions with numbers of their own, on a disk and behind a URL."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import locations
from pipeline.errors import InputError
from pipeline.publishing import Published, publish, release_lease, release_path
from pipeline.store import Artifact, Store, key_of
from pipeline.task import Task
from tests.conftest import latest_manifest


@pytest.fixture
def artifact(tmp_path: Path) -> Callable[[str], Artifact]:
    """What a release stage leaves: ``artifact("name")``."""

    def make(name: str) -> Artifact:
        def build(out: Path) -> Mapping[str, Any]:
            (out / "version" / "data").mkdir(parents=True)
            (out / "version" / "data" / "rest.parquet").write_bytes(name.encode() * 100)
            (out / "version" / "manifest.json").write_text(json.dumps({"name": name}))
            return {}

        return Store(tmp_path / "store").get_or_build("release", key_of(name), build, {})

    return make


def files_below(location: str) -> dict[str, bytes]:
    path = locations.local_path(location)
    if path is None:
        return {name: locations.read(f"{location}/{name}") or b"" for name in locations.entries(location)}
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def put(location: str, content: bytes) -> None:
    path = locations.local_path(location)
    if path is None:
        locations.write(location, content)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_a_version_holds_the_files_and_a_mark_that_it_is_whole(
    release: str, artifact: Callable[[str], Artifact]
) -> None:
    assert latest_manifest(release) is None
    one = artifact("one")
    published = publish(one, release)
    assert published == Published(f"{release}/versions/0001-{one.key[:8]}", new=True)
    assert published.name == f"0001-{one.key[:8]}"
    assert published.uri == (published.path if locations.is_url(release) else f"file://{published.path}")
    assert files_below(published.path) == {
        "_SUCCESS": b"",
        "data/rest.parquet": b"one" * 100,
        "manifest.json": b'{"name": "one"}',
    }
    assert latest_manifest(release) == {"name": "one"}


def test_unchanged_inputs_give_the_version_that_is_there(release: str, artifact: Callable[[str], Artifact]) -> None:
    first = publish(artifact("one"), release)
    before = files_below(release)
    assert publish(artifact("one"), release) == Published(first.path, new=False)
    assert {k: v for k, v in files_below(release).items() if "lease" not in k and "lock" not in k} == {
        k: v for k, v in before.items() if "lease" not in k and "lock" not in k
    }


def test_versions_are_numbered_and_latest_follows_what_was_published(
    release: str, artifact: Callable[[str], Artifact]
) -> None:
    names = [publish(artifact(name), release).name for name in ("one", "two", "one", "three")]
    assert [name[:4] for name in names] == ["0001", "0002", "0001", "0003"]
    assert latest_manifest(release) == {"name": "three"}
    publish(artifact("two"), release)
    assert latest_manifest(release) == {"name": "two"}


@pytest.mark.parametrize("same", [True, False])
def test_a_half_uploaded_version_is_never_taken_for_one(
    same: bool, release: str, artifact: Callable[[str], Artifact]
) -> None:
    one, two = artifact("one"), artifact("two")
    publish(one, release)
    left = f"0002-{(two if same else artifact('other')).key[:8]}"
    # On a disk what a killed process leaves has a temporary name, behind a URL no mark.
    name = left if locations.is_url(release) else ".tmp-0123"
    put(f"{release}/versions/{name}/data/rest.parquet", b"half")
    put(f"{release}/versions/{name}/data/more.parquet", b"half")
    assert latest_manifest(release) == {"name": "one"}
    published = publish(two, release)
    assert published.name == f"0002-{two.key[:8]}"
    assert published.new
    assert {file.split("/")[1] for file in files_below(release) if file.startswith("versions/")} == {
        f"0001-{one.key[:8]}",
        f"0002-{two.key[:8]}",
    }
    assert set(files_below(published.path)) == {"_SUCCESS", "data/rest.parquet", "manifest.json"}


def test_what_others_put_among_the_versions_is_left_alone_and_counts_for_nothing(
    release: str, artifact: Callable[[str], Artifact]
) -> None:
    one = artifact("one")
    for name in ("notes.txt", f"old-{one.key[:8]}/_SUCCESS", "backup-0009/_SUCCESS", "drafts/x"):
        put(f"{release}/versions/{name}", b"mine")
    before = files_below(release)
    assert publish(one, release).name == f"0001-{one.key[:8]}"
    assert before.items() <= files_below(release).items()


def test_a_latest_that_was_not_moved_before_a_kill_is_moved_by_the_next_run(
    release: str, artifact: Callable[[str], Artifact]
) -> None:
    publish(artifact("one"), release)
    second = publish(artifact("two"), release)
    put(f"{release}/LATEST", f"0001-{artifact('one').key[:8]}\n".encode())
    assert publish(artifact("two"), release) == Published(second.path, new=False)
    assert latest_manifest(release) == {"name": "two"}


def test_several_publish_at_once_under_numbers_of_their_own(release: str, artifact: Callable[[str], Artifact]) -> None:
    artifacts = [artifact(f"number {i}") for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        published = list(pool.map(lambda one: publish(one, release), artifacts * 2))
    assert {one.name[:4] for one in published} == {"0001", "0002", "0003", "0004"}
    assert len({one.name for one in published}) == 4
    assert sum(one.new for one in published) == 4


def test_a_run_that_holds_the_release_can_publish_and_a_second_one_waits(
    release: str, artifact: Callable[[str], Artifact]
) -> None:
    order, told = [], []

    def second() -> None:
        with release_lease(release, told.append):
            order.append(publish(artifact("two"), release).name[:4])

    thread = threading.Thread(target=second)
    with release_lease(release):
        thread.start()
        while not told:
            time.sleep(0.01)
        order.append(publish(artifact("one"), release).name[:4])
    thread.join(20)
    assert order == ["0001", "0002"]
    assert len(told) == 1


def test_a_release_that_cannot_be_written_is_the_users_to_fix(
    tmp_path: Path, artifact: Callable[[str], Artifact], request: pytest.FixtureRequest
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another --out"):
        publish(artifact("one"), tmp_path / "file" / "releases")
    with (
        pytest.raises(InputError, match=r"can't write the release.*\n.*\n.*choose another --out"),
        release_lease(str(tmp_path / "file" / "releases")),
    ):
        pass
    with pytest.raises(FileNotFoundError), release_lease(str(tmp_path / "releases")):
        raise FileNotFoundError("what happens inside is told as it is")
    request.getfixturevalue("s3_url")
    with pytest.raises(InputError, match="the bucket does not exist"):
        publish(artifact("one"), "s3://nowhere/releases")


def test_a_release_path_is_the_commands_then_the_tasks_then_the_default(
    tiny_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOZELINE_HOME", str(tmp_path))
    plain, own, url = (
        Task.load(tiny_task(), overrides)
        for overrides in ([], ["release.path=out"], ["release.path=s3://bucket/tiny/"])
    )
    assert release_path(own, "s3://bucket/other/") == "s3://bucket/other"
    assert release_path(own, str(tmp_path / "x")) == str(tmp_path / "x")
    assert release_path(own, None) == str(tmp_path / "task" / "out")
    assert release_path(url, None) == "s3://bucket/tiny"
    assert release_path(plain, None) == str(tmp_path / "releases" / "tiny")
    with pytest.raises(InputError, match="must not hold credentials"):
        release_path(plain, "s3://key:secret@bucket/tiny")
    behind = Task.from_dict(own.model_dump(), root="s3://bucket/tasks")
    assert release_path(behind, None) == "s3://bucket/tasks/out"
