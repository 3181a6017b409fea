"""The store: whole artifacts or none, whatever happens to the process that builds them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.errors import InputError, StoreDamaged
from pipeline.store import MANIFEST, RUN, Store, canonical_json, key_of, sha256_of

KEY = key_of({"steps": 3})
HEADER = {"version": 1, "spec": {"steps": 3}, "inputs": {}}


def build(out: Path) -> Mapping[str, Any]:
    (out / "data").mkdir()
    (out / "data" / "rows.bin").write_bytes(bytes(range(256)) * 40)
    (out / "settings.json").write_text('{"a": 1}')
    return {"rows": 40}


def files_of(root: Path) -> dict[str, bytes]:
    """Every file below a directory but the record of the run."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != RUN
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# ---- keys ----------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), values, max_size=5), st.randoms())
def test_a_key_does_not_depend_on_the_order_of_settings(settings: dict[str, Any], draw: Any) -> None:
    items = list(settings.items())
    draw.shuffle(items)
    assert key_of(dict(items)) == key_of(settings)
    assert json.loads(canonical_json(settings)) == settings


@given(values, values)
def test_other_settings_have_another_key(one: Any, other: Any) -> None:
    assume(canonical_json(one) != canonical_json(other))
    assert key_of(one) != key_of(other)


def test_what_is_not_a_number_has_no_key() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        key_of({"rate": float("nan")})


# ---- building and finding ------------------------------------------------------------------------------


def test_an_artifact_is_built_once_and_found_afterwards(store: Store) -> None:
    calls = []

    def counted(out: Path) -> Mapping[str, Any]:
        calls.append(out)
        return build(out)

    assert store.find("fit", KEY) is None
    built = store.get_or_build("fit", KEY, counted, HEADER)
    again = store.get_or_build("fit", KEY, counted, HEADER)
    assert len(calls) == 1
    assert built.path == again.path == store.path_of("fit", KEY)
    assert built.manifest == again.manifest
    assert built.key == KEY
    assert built.meta == {"rows": 40}
    assert not calls[0].exists()


def test_the_manifest_names_every_file_with_its_size_and_hash(store: Store) -> None:
    artifact = store.get_or_build("fit", KEY, build, HEADER)
    assert artifact.manifest["stage"] == "fit"
    assert {key: artifact.manifest[key] for key in HEADER} == HEADER
    on_disk = {name: data for name, data in files_of(artifact.path).items() if name != MANIFEST}
    assert artifact.manifest["files"] == {
        name: {"bytes": len(data), "sha256": sha256_of(artifact.path / name)} for name, data in on_disk.items()
    }
    artifact.verify()


def test_a_file_can_be_read_by_whom_its_directory_can_though_a_library_kept_it_to_its_owner(store: Store) -> None:
    def keeps_to_itself(out: Path) -> Mapping[str, Any]:
        meta = build(out)
        (out / "data").chmod(0o755)
        (out / "data" / "rows.bin").chmod(0o600)
        return meta

    path = store.get_or_build("fit", KEY, keeps_to_itself, HEADER).path
    assert (path / "data" / "rows.bin").stat().st_mode & 0o777 == 0o644


def test_equal_builds_leave_equal_bytes_but_for_the_record_of_the_run(tmp_path: Path) -> None:
    one, other = (Store(tmp_path / name).get_or_build("fit", KEY, build, HEADER) for name in ("one", "other"))
    assert files_of(one.path) == files_of(other.path)
    assert set(files_of(one.path)) == {"data/rows.bin", "settings.json", MANIFEST}


def test_a_build_that_fails_leaves_nothing_and_can_be_tried_again(store: Store) -> None:
    def failing(out: Path) -> Mapping[str, Any]:
        build(out)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.get_or_build("fit", KEY, failing, HEADER)
    assert store.find("fit", KEY) is None
    assert list((store.root / "tmp").iterdir()) == []
    assert store.get_or_build("fit", KEY, build, HEADER).meta == {"rows": 40}


def test_a_store_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="CLOZELINE_STORE"):
        Store(tmp_path / "file" / "store").get_or_build("fit", KEY, build, HEADER)


# ---- damage --------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    data = (path / "data" / "rows.bin").read_bytes()
    (path / "data" / "rows.bin").write_bytes(data[:-1])


def _remove(path: Path) -> None:
    (path / "settings.json").unlink()


def _cut_manifest(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:50])


def _remove_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


@pytest.mark.parametrize("damage", [_cut, _remove, _cut_manifest, _remove_manifest])
def test_a_damaged_artifact_is_built_again_to_the_same_bytes(damage: Any, store: Store) -> None:
    artifact = store.get_or_build("fit", KEY, build, HEADER)
    whole = files_of(artifact.path)
    damage(artifact.path)
    assert store.find("fit", KEY) is None
    again = store.get_or_build("fit", KEY, build, HEADER)
    assert files_of(again.path) == whole
    assert list((store.root / "tmp").iterdir()) == []


def test_verify_finds_a_single_flipped_bit(store: Store) -> None:
    artifact = store.get_or_build("fit", KEY, build, HEADER)
    file = artifact.path / "data" / "rows.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = store.find("fit", KEY)  # sizes alone do not tell
    assert found is not None
    with pytest.raises(StoreDamaged, match=r"rows\.bin does not match"):
        found.verify()


def test_verify_finds_a_missing_file(store: Store) -> None:
    artifact = store.get_or_build("fit", KEY, build, HEADER)
    (artifact.path / "settings.json").unlink()
    with pytest.raises(StoreDamaged, match=r"settings\.json"):
        artifact.verify()


# ---- several processes, and killed ones ----------------------------------------------------------------

BUILDER = textwrap.dedent("""\
    import os, sys, time
    from pathlib import Path
    from pipeline.store import Store

    root, key, seconds, log = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), Path(sys.argv[4])

    def build(out):
        (out / "data").mkdir()
        (out / "data" / "rows.bin").write_bytes(bytes(range(256)) * 20)
        with log.open("a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(seconds)
        (out / "data" / "rows.bin").write_bytes(bytes(range(256)) * 40)
        (out / "settings.json").write_text('{"a": 1}')
        return {"rows": 40}

    header = {"version": 1, "spec": {"steps": 3}, "inputs": {}}
    print(Store(root).get_or_build("fit", key, build, header).path)
    """)


def start_builder(store: Store, seconds: float, log: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(store.root), KEY, str(seconds), str(log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_until_building(process: subprocess.Popen[str], log: Path) -> None:
    while not (log.exists() and log.read_text()):
        assert process.poll() is None, "the builder ended too early"
        time.sleep(0.01)


@pytest.mark.parametrize("kills", [1, 3])
def test_after_a_kill_in_the_middle_the_same_call_finishes_with_the_same_bytes(
    kills: int, store: Store, tmp_path: Path
) -> None:
    for number in range(kills):
        log = tmp_path / f"log-{number}"
        process = start_builder(store, 600, log)
        wait_until_building(process, log)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert store.find("fit", KEY) is None
        assert len(list((store.root / "tmp").iterdir())) == 1  # the latest litter; earlier litter was swept
    after = store.get_or_build("fit", KEY, build, HEADER)
    undisturbed = Store(tmp_path / "undisturbed").get_or_build("fit", KEY, build, HEADER)
    assert files_of(after.path) == files_of(undisturbed.path)
    after.verify()
    assert list((store.root / "tmp").iterdir()) == []


def test_litter_of_another_key_is_left_alone(store: Store) -> None:
    theirs = store.root / "tmp" / f"fit-{key_of('other')}-12345678"
    theirs.mkdir(parents=True)
    store.get_or_build("fit", KEY, build, HEADER)
    assert theirs.is_dir()


def test_several_processes_build_a_key_once(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start_builder(store, 0.5, log) for _ in range(3)]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert answers == [str(store.path_of("fit", KEY))] * 3
    assert len(log.read_text().split()) == 1
