"""The commands that need no run: settings, the store; and what `run` makes of its options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.cli_console import human_bytes
from pipeline.errors import InputError
from pipeline.publishing import release_lease
from pipeline.settings import EngineName, Settings
from pipeline.store import Store


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """No settings but a home of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CLOZELINE_", "PREFECT_"))}
    return {**kept, "CLOZELINE_HOME": str(tmp_path / "home"), "PREFECT_HOME": str(tmp_path / "prefect")}


def clozeline(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def in_process(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], *arguments: str) -> str:
    """The output of a command that ends well."""
    for key in [key for key in os.environ if key.startswith(("CLOZELINE_", "PREFECT_API"))]:
        monkeypatch.delenv(key)
    for key, value in environment.items():
        if key.startswith("CLOZELINE_"):
            monkeypatch.setenv(key, value)
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def build(store: Store, stage: str, key: str, size: int) -> tuple[str, str]:
    """An artifact of one file; returns its reference."""

    def write(directory: Path) -> dict[str, Any]:
        (directory / "file").write_bytes(b"x" * size)
        return {}

    store.get_or_build(stage, key, write, {})
    return stage, key


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home" / ".clozeline" / "store")


def test_config_lists_every_setting_with_variable_value_default_choices_and_meaning(
    environment: dict[str, str],
) -> None:
    given = {"CLOZELINE_ENGINE": "ray", "CLOZELINE_STAGE_TIMEOUT": "60"}
    listed = json.loads(clozeline({**environment, **given}, "config", "--json").stdout)
    settings = {row["variable"]: row for row in listed["settings"]}
    assert list(settings) == [f"CLOZELINE_{name.upper()}" for name in Settings.model_fields]
    assert all(row["description"] for row in settings.values())
    engine = settings["CLOZELINE_ENGINE"]
    assert (engine["value"], engine["default"], engine["given"]) == ("ray", "local", True)
    assert engine["choices"] == list(get_args(EngineName))
    assert settings["CLOZELINE_STAGE_TIMEOUT"]["value"] == 60
    assert settings["CLOZELINE_STORE"]["given"] is False
    assert listed["in_force"]["store"] == str(Path(environment["CLOZELINE_HOME"], ".clozeline", "store"))
    assert listed["prefect"] == {"PREFECT_API_URL": None, "from": None}


def test_config_tells_the_server_in_force_and_masks_credentials(environment: dict[str, str]) -> None:
    given = {
        "PREFECT_API_URL": "http://me:secret@127.0.0.1:4200/api",
        "CLOZELINE_PORT": "4300",
        "CLOZELINE_RAY_ADDRESS": "ray://me:secret@head:10001",
        "CLOZELINE_ENGIN": "ray",
        "COLUMNS": "200",
    }
    for arguments in (["config"], ["config", "--json"]):
        done = clozeline({**environment, **given}, *arguments)
        assert done.returncode == 0, done.stderr
        for shown in ("http://***@127.0.0.1:4200/api", "ray://***@head:10001"):
            assert shown in done.stdout
        assert "secret" not in done.stdout + done.stderr
    told = clozeline({**environment, **given}, "config").stderr
    assert "CLOZELINE_ENGINE" in told  # the nearest to CLOZELINE_ENGIN
    assert "CLOZELINE_PORT" not in told  # a setting of the cluster script


def test_names_and_keys_are_whole_and_in_one_line_on_80_columns(store: Store, environment: dict[str, str]) -> None:
    with store.using([build(store, "annotate", "a" * 32, 999_900), build(store, "fit", "b" * 32, 10)], {}):
        narrow = {**environment, "COLUMNS": "80", "CLOZELINE_RAY_ADDRESS": f"ray://{'x' * 60}:1"}
        settings, artifacts = (clozeline(narrow, *command).stdout for command in (["config"], ["store", "ls"]))
    assert all(f"CLOZELINE_{name.upper()} " in settings for name in Settings.model_fields)
    assert "x" * 60 in "".join(line.split("│")[2].strip() for line in settings.splitlines() if line.count("│") == 5)
    rows = {line.split()[1]: line for line in artifacts.splitlines() if line.startswith(("annotate", "fit"))}
    assert list(rows) == ["a" * 32, "b" * 32]
    assert all(row.rstrip().endswith("yes") for row in rows.values())
    assert "…" not in settings + artifacts


@pytest.mark.parametrize("command", [["config"], ["run", "no.yaml"], ["store", "gc"], ["init", "no.parquet"]])
def test_a_wrong_value_of_a_variable_is_the_users_error_in_every_command(
    environment: dict[str, str], command: list[str]
) -> None:
    given = {"CLOZELINE_ENGINE": "foo", "CLOZELINE_STAGE_TIMEOUT": "abc"}
    done = clozeline({**environment, **given}, *command)
    assert done.returncode == 2
    assert "CLOZELINE_ENGINE=foo" in done.stderr
    assert "'pool'" in done.stderr
    assert "CLOZELINE_STAGE_TIMEOUT=abc" in done.stderr
    assert "pydantic" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("variable", ["CLOZELINE_STORE", "CLOZELINE_CACHE"])
def test_a_location_with_a_password_is_refused_without_showing_it(environment: dict[str, str], variable: str) -> None:
    done = clozeline({**environment, variable: "s3://key:secret@bucket/store"}, "store", "ls")
    assert done.returncode == 2
    assert f"{variable}=s3://***@bucket/store: a URL must not hold credentials" in done.stderr
    assert "secret" not in done.stderr


def test_a_release_directory_with_a_password_is_refused_before_a_server_starts(
    environment: dict[str, str], tiny_task: Callable[..., Path]
) -> None:
    done = clozeline(environment, "run", str(tiny_task()), "--out", "s3://key:secret@bucket/out")
    assert done.returncode == 2
    assert "in: s3://***@bucket/out" in done.stderr
    assert "secret" not in done.stderr


def test_a_wrong_value_is_told_wherever_the_settings_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOZELINE_STAGE_TIMEOUT", "-1")
    with pytest.raises(InputError, match=r"^CLOZELINE_STAGE_TIMEOUT=-1: input should be greater than 0"):
        Settings()


def test_check_counts_the_work_of_every_generation(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], tiny_task: Callable[..., Path]
) -> None:
    def told(generations: int) -> dict[str, Any]:
        override = f"ipet.generations={generations}"
        output = in_process(monkeypatch, environment, "check", str(tiny_task()), "--set", override, "--json")
        found: dict[str, Any] = json.loads(output)
        return found

    plain, with_ipet = told(0), told(2)
    assert (plain["annotators"], plain["fits"], plain["model_passes"]) == (2, 6, 8)
    # Two more fits of two annotators without folds, and as many passes over the transfer set.
    assert (with_ipet["annotators"], with_ipet["fits"], with_ipet["model_passes"]) == (2, 10, 12)
    assert with_ipet["device_hours"] > plain["device_hours"]


def test_check_shows_no_bar_of_a_library(environment: dict[str, str], tiny_task: Callable[..., Path]) -> None:
    done = clozeline(environment, "check", str(tiny_task()))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_that_of_the_package(environment: dict[str, str]) -> None:
    assert clozeline(environment, "--version").stdout == f"clozeline {version('clozeline')}\n"


def test_help_needs_no_right_settings(environment: dict[str, str]) -> None:
    done = clozeline({**environment, "CLOZELINE_ENGINE": "foo"}, "run", "--help")
    assert done.returncode == 0
    assert "local|pool|ray|dask" in done.stdout


def test_an_unknown_engine_is_refused_with_the_known_ones(environment: dict[str, str]) -> None:
    done = clozeline(environment, "run", "no.yaml", "--engine", "foo")
    assert done.returncode == 2
    assert all(engine in done.stderr for engine in get_args(EngineName))


def previewed(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], task: Path, texts: list[str | None]) -> str:
    """What `preview` prints of a task's patterns on these texts."""
    path = task.parent / "unlabelled.parquet"
    pq.write_table(pa.table({"key": [str(i) for i in range(len(texts))], "text": pa.array(texts, pa.string())}), path)
    arguments = ("preview", str(task), "--set", "inputs.carry=[]")
    full = json.loads(in_process(monkeypatch, environment, *arguments, "--json"))
    given = [text for text in texts if text and text.strip()]
    assert (full["rows"], full["blank"]) == (len(given), len(texts) - len(given))
    assert [found["examples"][: len(given)] for found in full["patterns"]] == [
        [f"{text} It was [MASK]." for text in given[:2]],
        [f"[MASK]: {text}" for text in given[:2]],
    ]
    return in_process(monkeypatch, environment, *arguments)


def test_preview_spells_out_control_characters(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], tiny_task: Callable[..., Path]
) -> None:
    text = "good \x1b]0;title\x07\x1b[31m\n\x9b2J \u202ebad\u2028 \U0001f469\u200d\U0001f680 caf\xe9 [red]:bug:\\"
    told = previewed(monkeypatch, environment, tiny_task(), [text])
    escaped = r"good \x1b]0;title\x07\x1b[31m\n\x9b2J \u202ebad\u2028"
    assert f"  {escaped} \U0001f469\u200d\U0001f680 caf\xe9 [red]:bug:\\ It was [MASK].\n" in told


@pytest.mark.parametrize("text", ["start " + "x" * 3_000_000 + " end", "start " + "\x1b" * 5000 + " end"])
def test_preview_shows_the_two_ends_of_a_long_text(
    text: str, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], tiny_task: Callable[..., Path]
) -> None:
    lines = previewed(monkeypatch, environment, tiny_task(), [text]).splitlines()
    first, second = (line for line in lines if "start" in line)
    assert first.startswith("  start ")
    assert first.endswith(" end It was [MASK].")
    assert second.startswith("  [MASK]: start ")
    assert second.endswith(" end")
    assert all(550 < len(line) < 610 and line.count("…") == 1 for line in (first, second))


@pytest.mark.parametrize(
    ("texts", "message"), [([], "unlabelled.parquet has no row"), ([None, " "], "unlabelled.parquet have no text")]
)
def test_preview_says_that_there_is_no_text_to_show(
    texts: list[str | None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    tiny_task: Callable[..., Path],
) -> None:
    told = previewed(monkeypatch, environment, tiny_task(), texts)
    assert message in told
    assert "words:" in told
    assert "are cut" not in told


def test_preview_leaves_rows_without_text_out(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], tiny_task: Callable[..., Path]
) -> None:
    assert "of 2 rows are cut" in previewed(monkeypatch, environment, tiny_task(), [None, "good", "", "bad"])


@pytest.mark.prefect
def test_a_run_tells_at_once_that_its_server_is_away(
    environment: dict[str, str], tiny_task: Callable[..., Path]
) -> None:
    task = str(tiny_task())
    done = clozeline({**environment, "PREFECT_API_URL": "http://127.0.0.1:9/api"}, "run", task)
    assert done.returncode == 1
    assert "failed: the Prefect server at http://127.0.0.1:9/api does not answer" in done.stderr
    assert "unset PREFECT_API_URL" in done.stderr
    done = clozeline({**environment, "PREFECT_API_URL": "nonsense"}, "run", task)
    assert done.returncode == 2
    assert "this is no address" in done.stderr


def test_what_is_written_to_this_machine_alone_is_no_url(
    environment: dict[str, str], tiny_task: Callable[..., Path]
) -> None:
    for arguments in (
        ("predict", "releases", "in.parquet", "s3://bucket/out.parquet"),
        ("adapt", str(tiny_task()), "--set", "adapt.steps=1", "--out", "s3://bucket/model"),
        ("init", "in.parquet", "--out", "s3://bucket/task.yaml"),
    ):
        done = clozeline(environment, *arguments)
        assert done.returncode == 2
        assert "written to this machine alone" in done.stderr
    assert "from a file on this machine" in clozeline(environment, "init", "s3://bucket/in.parquet").stderr


def test_predict_replaces_a_file_when_told_to_alone(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_text("mine")
    done = clozeline(environment, "predict", str(tmp_path), "in.parquet", str(tmp_path / "out.parquet"))
    assert done.returncode == 2
    assert "is there already" in done.stderr
    done = clozeline(environment, "predict", str(tmp_path), "in.parquet", str(tmp_path / "out.parquet"), "--force")
    assert "neither a release nor a student" in done.stderr
    assert (tmp_path / "out.parquet").read_text() == "mine"


def test_a_run_tells_that_it_waits_for_another_and_takes_the_engine_that_it_is_given(
    environment: dict[str, str], tiny_task: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "blocked" / "ray").mkdir(parents=True)
    (tmp_path / "blocked" / "ray" / "__init__.py").write_text("raise ImportError")  # as where it is not installed
    release = tmp_path / "release"
    search = os.pathsep.join([str(tmp_path / "blocked"), str(Path(__file__).resolve().parent.parent)])
    command = [sys.executable, "-m", "flows.cli", "run", str(tiny_task()), "--out", str(release), "--engine", "ray"]
    with release_lease(str(release)):
        running = subprocess.Popen(
            command,
            env={**environment, "PYTHONPATH": search, "CLOZELINE_ENGINE": "dask"},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert running.stderr is not None
        line = next(line for line in running.stderr if "waiting" in line)
        assert "waiting for another run" in line
        assert str(release) in line
        assert f"process {os.getpid()}" in line
    _, told = running.communicate(timeout=90)
    assert running.returncode == 2
    assert "the engine ray needs Ray" in told


def test_store_ls_lists_artifacts_with_sizes(
    store: Store, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(store, "fit", "a" * 32, 3000)
    with store.using([build(store, "blend", "b" * 32, 10)], {}):
        found = json.loads(in_process(monkeypatch, environment, "store", "ls", "--json"))
        table = in_process(monkeypatch, {**environment, "COLUMNS": "160"}, "store", "ls")
    assert {(row["stage"], row["key"], row["in_use"]) for row in found} == {
        ("fit", "a" * 32, False),
        ("blend", "b" * 32, True),
    }
    assert all(row["bytes"] >= size for row, size in zip(found, (3000, 10), strict=True))
    assert "2 artifacts" in table


def test_store_du_adds_up_each_stage(
    store: Store, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(store, "blend", "a" * 32, 10)
    build(store, "fit", "b" * 32, 30_000)
    build(store, "fit", "c" * 32, 30_000)
    found = json.loads(in_process(monkeypatch, environment, "store", "du", "--json"))
    assert list(found["stages"]) == ["fit", "blend"]
    assert 60_000 <= found["stages"]["fit"] < 65_000
    assert found["bytes"] == sum(found["stages"].values())
    assert "kB" in in_process(monkeypatch, environment, "store", "du")


def test_store_gc_only_tells_what_would_go_unless_told_to_remove_it(
    store: Store, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = build(store, "fit", "a" * 32, 3000)
    older, newer = build(store, "release", "b" * 32, 10), build(store, "release", "c" * 32, 10)
    store.record_release("tiny", "/releases/tiny", "0001", [older])
    store.record_release("tiny", "/releases/tiny", "0002", [newer])

    def gone(options: Iterable[str]) -> set[tuple[str, str]]:
        told = json.loads(in_process(monkeypatch, environment, "store", "gc", "--json", *options))
        assert told["removed"] is ("--yes" in options)
        assert all(row["why"] for row in told["stays"])
        return {(row["stage"], row["key"]) for row in told["goes"]}

    assert gone([]) == {loose}
    assert gone(["--keep", "1"]) == {loose, older}
    assert "dry run: 1 artifacts would go" in in_process(monkeypatch, environment, "store", "gc")
    assert all(store.find(*reference) for reference in (loose, older, newer))
    assert gone(["--keep", "1", "--yes"]) == {loose, older}
    assert [store.find(*reference) is not None for reference in (loose, older, newer)] == [False, False, True]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (34_500_000, "34.5 MB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")],
)
def test_sizes_for_people(count: float, shown: str) -> None:
    assert human_bytes(count) == shown


@pytest.fixture
def two_versions(tmp_path: Path) -> Path:
    """A release with two whole versions of one row each, the second in force."""
    release = tmp_path / "release"
    for name in ("0001-aaaaaaaa", "0002-bbbbbbbb"):
        version = release / "versions" / name
        (version / "data").mkdir(parents=True)
        pq.write_table(pa.table({"row_id": ["a"], "content_hash": ["0" * 16]}), version / "data" / "rest-0.parquet")
        manifest = {"rows": {"rest": 1}, "files": {"data/rest-0.parquet": {"bytes": 0, "sha256": ""}}}
        (version / "manifest.json").write_text(json.dumps(manifest))
        (version / "_SUCCESS").touch()
    (release / "LATEST").write_text("0002-bbbbbbbb\n")
    return release


def test_versions_are_listed_rolled_back_and_promoted(
    two_versions: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = str(two_versions)
    assert "in force: 0001-aaaaaaaa; held: 0002-bbbbbbbb" in in_process(monkeypatch, environment, "rollback", release)
    monkeypatch.setenv("COLUMNS", "160")
    listed = json.loads(in_process(monkeypatch, environment, "versions", release, "--json"))
    assert [(row["name"], row["state"], row["reasons"]) for row in listed] == [
        ("0001-aaaaaaaa", "in force", []),
        ("0002-bbbbbbbb", "held", ["rolled back to 0001-aaaaaaaa"]),
    ]
    assert "0002-bbbbbbbb" in in_process(monkeypatch, environment, "versions", release)
    assert "in force: 0002-bbbbbbbb" in in_process(monkeypatch, environment, "promote", release)


def test_forget_only_tells_what_would_go_unless_told_to(
    two_versions: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("forget", "a", "--release", str(two_versions))
    assert "dry run: 1 rows would be forgotten" in in_process(monkeypatch, environment, *command)
    told = json.loads(in_process(monkeypatch, environment, *command, "--json"))
    assert (told["removed"], told["versions"]) == (False, {"0001-aaaaaaaa": 1, "0002-bbbbbbbb": 1})
    files = sorted(two_versions.rglob("*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [1, 1]
    assert "forgotten: 1 rows" in in_process(monkeypatch, environment, *command, "--yes")
    assert not list(two_versions.rglob("*.parquet"))  # it was the only row of each


@pytest.mark.parametrize("command", ["versions", "promote", "rollback"])
def test_commands_on_a_path_without_versions_name_it_and_the_fix(
    command: str, environment: dict[str, str], tmp_path: Path
) -> None:
    done = clozeline(environment, command, str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert f"in: {tmp_path / 'nothing'}" in done.stderr
    assert "fix: give a release's directory or URL" in done.stderr
    assert not (tmp_path / "nothing").exists()
