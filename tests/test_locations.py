"""Small files at paths and behind URLs."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from pipeline.locations import below, read_file, read_json, remove_file, write_atomically, write_file


@pytest.fixture(params=["path", "file://", "memory://"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A directory with nothing below it, as a path or a URL."""
    return {"path": str(tmp_path), "file://": tmp_path.as_uri(), "memory://": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


def test_a_small_file_is_written_replaced_read_and_removed_wherever_it_lies(place: str) -> None:
    location = below(place, "held", "one.json")
    assert (read_file(location), read_json(location)) == (None, None)
    write_file(location, '{"a": 1}')
    assert read_json(location) == {"a": 1}
    write_file(location, "\N{SNOWMAN}")
    assert read_file(location) == "\N{SNOWMAN}".encode()
    remove_file(location)
    remove_file(location)  # what is not there is no error
    assert read_file(location) is None


@pytest.mark.parametrize("content", ["", "{", "5", "null", "\x00"])
def test_what_is_no_json_object_counts_for_nothing(content: str, place: str) -> None:
    location = below(place, "one.json")
    write_file(location, content)
    assert read_json(location) is None


def test_what_lies_below_a_file_url_is_a_path(tmp_path: Path) -> None:
    assert below(tmp_path.as_uri(), "versions", "LATEST") == str(tmp_path / "versions" / "LATEST")


def test_a_small_file_is_replaced_whole_and_leaves_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "LATEST"
    write_atomically(path, "one")
    with path.open() as reader:
        write_atomically(path, "two \N{SNOWMAN}")
        assert reader.read() == "one"  # who had it open reads the old one to its end
    assert path.read_text(encoding="utf-8") == "two \N{SNOWMAN}"
    assert list(tmp_path.iterdir()) == [path]
