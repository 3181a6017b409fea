"""Copies of what lies behind URLs: fetched once, again when it changed, whole or not at all."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import locations
from pipeline.errors import InputError, StorageTrouble
from pipeline.transfer import fetch_file, fetch_files, fetch_tree, upload_tree


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return str(request.getfixturevalue("s3_url"))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server for the files below the test's ``web``."""
    (tmp_path / "web").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_is_fetched_once_and_again_when_it_changed(url: str, tmp_path: Path) -> None:
    file = f"{url}/day=1/part.parquet"
    locations.write(file, b"one")
    first = fetch_file(file, tmp_path)
    assert first.read_bytes() == b"one"
    assert first.parts[-2:] == ("day=1", "part.parquet")
    first.write_bytes(b"our")  # as long as it was: whoever fetches it again would bring the old bytes back
    assert fetch_file(file, tmp_path) == first
    assert first.read_bytes() == b"our"

    locations.write(file, b"two")
    second = fetch_file(file, tmp_path)
    assert second != first
    assert second.read_bytes() == b"two"
    first.unlink()
    second.unlink()
    assert fetch_file(file, tmp_path).read_bytes() == b"two"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["part.parquet"]


def test_a_cut_copy_is_fetched_again(url: str, tmp_path: Path) -> None:
    locations.write(f"{url}/file", b"whole")
    fetch_file(f"{url}/file", tmp_path).write_bytes(b"wh")
    assert fetch_file(f"{url}/file", tmp_path).read_bytes() == b"whole"


def test_a_file_that_is_not_there_is_named(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"there is no such file\n  in: {url}/none"):
        fetch_file(f"{url}/none", tmp_path)


def test_a_path_and_a_file_url_are_no_copy_but_the_file_itself(tmp_path: Path) -> None:
    path = tmp_path / "with space" / "file"
    assert fetch_file(str(path), tmp_path) == path
    assert fetch_file(path.as_uri(), tmp_path) == path


def test_a_file_of_a_web_server_is_fetched(web: str, tmp_path: Path) -> None:
    (tmp_path / "web" / "rows.parquet").write_bytes(b"rows")
    assert fetch_file(f"{web}/rows.parquet", tmp_path).read_bytes() == b"rows"
    (tmp_path / "web" / "rows.parquet").write_bytes(b"ROWS")
    os.utime(tmp_path / "web" / "rows.parquet", (2e9, 2e9))  # the server tells whole seconds
    assert fetch_file(f"{web}/rows.parquet", tmp_path).read_bytes() == b"ROWS"
    with pytest.raises(InputError, match="there is no such file"):
        fetch_file(f"{web}/none.parquet", tmp_path)


def test_a_file_of_a_web_server_is_kept_until_the_server_tells_another_time_and_its_query_is_no_part_of_its_name(
    web: str, tmp_path: Path
) -> None:
    (tmp_path / "web" / "rows.parquet").write_bytes(b"rows")
    url = f"{web}/rows.parquet?signature={'s' * 300}"
    copy = fetch_file(url, tmp_path)
    assert copy.name == "rows.parquet"
    copy.write_bytes(b"mine")
    assert fetch_file(url, tmp_path).read_bytes() == b"mine"


def test_a_tree_comes_back_as_it_was_uploaded_and_is_fetched_once(url: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    for name in ("a.bin", "inner/b.bin"):
        (source / name).write_bytes(name.encode() * 1000)
    upload_tree(source, ["a.bin", "inner/b.bin"], f"{url}/model")
    # fsspec's memory gives all its readers one position in a file, so that several at once read it in pieces.
    with ThreadPoolExecutor(1 if url.startswith("memory:") else 4) as pool:
        trees = set(pool.map(lambda _: fetch_tree(f"{url}/model", tmp_path / "copies"), range(4)))
    [tree] = trees
    assert tree is not None
    assert tree.name == "model"
    assert {str(f.relative_to(tree)): f.read_bytes() for f in tree.rglob("*") if f.is_file()} == {
        name: name.encode() * 1000 for name in ("a.bin", "inner/b.bin")
    }
    locations.write(f"{url}/model/a.bin", b"changed")
    again = fetch_tree(f"{url}/model", tmp_path / "copies")
    assert again != tree
    assert fetch_tree(f"{url}/nothing", tmp_path / "copies") is None


def test_a_file_that_comes_in_short_is_no_copy(url: str, tmp_path: Path) -> None:
    locations.write(f"{url}/model/a.bin", b"half")
    with pytest.raises(StorageTrouble, match="came with 4 bytes instead of 8"):
        fetch_files(f"{url}/model", {"a.bin": 8}, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_a_listing_shows_what_another_has_just_written(url: str) -> None:
    assert locations.entries(f"{url}/list") == {}
    for number in range(3):
        locations.write(f"{url}/list/{number}", b"x" * number)
        assert [entry.bytes for entry in locations.entries(f"{url}/list").values()] == list(range(number + 1))
    locations.remove([f"{url}/list/0", f"{url}/list/0"])
    assert list(locations.entries(f"{url}/list")) == ["1", "2"]
    assert [found.rsplit("/", 1)[-1] for found in locations.matches(f"{url}/list/*")] == ["1", "2"]


def test_a_storage_that_nobody_knows_is_named() -> None:
    with pytest.raises(InputError, match="there is no storage called nowhere://"):
        locations.read("nowhere://bucket/file")


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:secret@bucket/rows",
        "s3://key:se/cr@et@bucket/rows",
        "https://:secret@host/rows",
        "zip://a::ftp://me:secret@host/a.zip",
    ],
)
def test_a_url_with_a_password_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(InputError, match="must not hold credentials") as told:
        locations.read(url)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b:c@d",
        "hdfs://host:8020/a@b",
        "http://[::1]:8020/a@b",
        "abfs://box@account.dfs.core.windows.net/a",
        "/a:b@c",
    ],
)
def test_what_only_looks_like_a_password_is_none(url: str) -> None:
    locations.refuse_credentials(url)


def test_steps_up_are_taken_within_the_bucket_and_not_above_it() -> None:
    assert locations.join("s3://bucket/tasks/one", "../../rows/./a.parquet") == "s3://bucket/rows/a.parquet"
    assert locations.join("s3://bucket/tasks", "..") == "s3://bucket"
    with pytest.raises(InputError, match="leads above the bucket"):
        locations.join("s3://bucket/tasks", "../../other/a.parquet")


class _Refused(OSError):
    """What a storage client raises for an answer."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(5, code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (_Refused(400, "RequestTimeout"), StorageTrouble),
        (_Refused(503, "SlowDown"), StorageTrouble),
        (_Refused(409, "ConditionalRequestConflict"), StorageTrouble),
        (ConnectionResetError("reset"), StorageTrouble),
        (TimeoutError("too long"), StorageTrouble),
        (_Refused(400, "InvalidBucketName"), InputError),
        (_Refused(403, "AccessDenied"), InputError),
    ],
)
def test_what_may_pass_is_told_from_what_the_user_can_fix(raised: OSError, told: type[Exception]) -> None:
    with pytest.raises(told) as caught, locations.translated("s3://bucket/file"):
        raise raised
    assert type(caught.value) is told


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="the package is installed")
def test_a_storage_that_needs_a_package_names_it() -> None:
    with pytest.raises(InputError, match="install the fsspec package for gs"):
        locations.read("gs://bucket/file")
