"""Versions: which is in force, which are held, and moving that, on a disk and behind a URL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline import locations
from pipeline.errors import InputError, VersionHeld
from pipeline.locations import below, write_file
from pipeline.publishing import Published, publish, raise_if_held
from pipeline.store import Artifact, Store, key_of
from pipeline.task import Gate
from pipeline.versions import (
    held_records,
    hold,
    latest_name,
    list_versions,
    newest_manifest,
    promote,
    put_in_force,
    rollback,
)
from tests.conftest import latest_manifest

Make = Callable[[str, int], Artifact]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """What a release stage leaves: ``make("name", rows)``."""

    def artifact(name: str, rows: int) -> Artifact:
        def build(out: Path) -> Mapping[str, Any]:
            version = out / "version"
            (version / "data").mkdir(parents=True)
            (version / "data" / "rest.parquet").write_bytes(name.encode())
            metrics = {"summary": {"label_counts": {"good": rows, "bad": rows}}, "cross_validation": None}
            (version / "metrics.json").write_text(json.dumps(metrics))
            manifest = {"name": name, "labels": ["good", "bad"], "rows": {"rest": rows}}
            (version / "manifest.json").write_text(json.dumps(manifest))
            return {}

        return Store(tmp_path / "store").get_or_build("release", key_of(name), build, {})

    return artifact


@pytest.fixture
def put(release: str, make: Make) -> Callable[..., Published]:
    """Publish a version of some rows: ``put("name", 100)``."""

    def one(name: str, rows: int = 100, **limits: Any) -> Published:
        return publish(make(name, rows), release, Gate(**limits))

    return one


def states(release: str) -> list[str]:
    return [version.state for version in list_versions(release)]


def test_the_first_version_is_never_held(release: str, put: Callable[..., Published]) -> None:
    assert put("one", 0).held == ()
    assert states(release) == ["in force"]


def test_a_version_that_looks_worse_is_written_and_held(release: str, put: Callable[..., Published]) -> None:
    first, second = put("one"), put("two", 10)
    assert second.new
    assert second.held == ("10 rows are fewer than 0.5 times the 100 rows of the version in force",)
    assert latest_name(release) == first.name
    [_, held] = list_versions(release)
    assert (held.name, held.state, held.reasons, held.rows) == (second.name, "held", second.held, {"rest": 10})
    assert held.created > 0
    assert latest_manifest(release) == {"name": "one", "labels": ["good", "bad"], "rows": {"rest": 100}}


def test_a_held_version_stays_held_under_its_number_and_later_ones_go_their_way(
    release: str, put: Callable[..., Published]
) -> None:
    put("one")
    second = put("two", 10)
    since = held_records(release)[second.name].time
    assert put("two", 10) == Published(second.path, new=False, held=second.held)
    assert held_records(release)[second.name].time == since
    third = put("three", 90)
    assert (third.name[:4], third.held) == ("0003", ())
    assert states(release) == ["earlier", "held", "in force"]


def test_a_record_that_lacks_everything_still_holds_its_version(release: str, put: Callable[..., Published]) -> None:
    put("one")
    second = put("two", 10)
    write_file(f"{release}/held/{second.name}.json", "{}")
    assert [version.reasons for version in list_versions(release)][1] == ("its record does not say why",)
    assert put("two", 10).held == ("its record does not say why",)
    assert promote(release) == second.name


def test_a_plan_goes_on_from_the_newest_version_in_force_or_not(release: str, put: Callable[..., Published]) -> None:
    assert newest_manifest(release) is None
    put("one")
    put("two", 10)
    newest = newest_manifest(release)
    assert newest is not None
    assert newest["name"] == "two"


def test_other_limits_let_the_same_version_pass(release: str, put: Callable[..., Published]) -> None:
    put("one")
    second = put("two", 10)
    assert put("two", 10, min_rows=0.01) == Published(second.path, new=False)
    assert states(release) == ["earlier", "in force"]
    assert held_records(release) == {}


def test_a_switched_off_gate_holds_nothing(release: str, put: Callable[..., Published]) -> None:
    put("one")
    assert put("two", 1, enabled=False).held == ()


def test_what_ends_a_run_with_a_held_version_says_why_and_names_the_fix(
    release: str, put: Callable[..., Published]
) -> None:
    first = put("one")
    raise_if_held(first, release)
    second = put("two", 10)
    with pytest.raises(VersionHeld) as caught:
        raise_if_held(second, release)
    assert not isinstance(caught.value, InputError)
    for part in (second.name, first.name, second.held[0], f"clozeline promote {release}"):
        assert part in str(caught.value)


def test_promote_puts_the_newest_held_version_in_force(release: str, put: Callable[..., Published]) -> None:
    put("one")
    put("two", 10)
    third = put("three", 9)
    assert promote(release) == third.name
    assert states(release) == ["earlier", "held", "in force"]
    assert put("three", 9) == Published(third.path, new=False)


@pytest.mark.parametrize("by", [lambda name: name, lambda name: "2", lambda name: "0002"])
def test_promote_takes_a_name_or_a_number(
    by: Callable[[str], str], release: str, put: Callable[..., Published]
) -> None:
    put("one")
    second = put("two", 10)
    put("three", 9)
    assert promote(release, by(second.name)) == second.name
    assert states(release) == ["earlier", "in force", "held"]


def test_rollback_holds_the_version_that_was_in_force_so_that_the_same_run_does_not_bring_it_back(
    release: str, put: Callable[..., Published]
) -> None:
    first, second = put("one"), put("two")
    assert rollback(release) == (second.name, first.name)
    assert states(release) == ["in force", "held"]
    assert put("two", enabled=False).held == (f"rolled back to {first.name}",)
    assert latest_name(release) == first.name
    third = put("three")
    assert third.held == ()
    assert promote(release) == second.name
    assert put("two").held == ()


def test_rollback_passes_over_held_versions_unless_one_is_named(release: str, put: Callable[..., Published]) -> None:
    first = put("one")
    second = put("two", 10)
    third = put("three")
    assert rollback(release) == (third.name, first.name)
    assert rollback(release, "3") == (first.name, third.name)
    assert rollback(release, second.name) == (third.name, second.name)
    assert states(release) == ["held", "in force", "held"]


def test_a_promotion_killed_before_its_end_is_finished_by_the_same_command_or_the_next_run(
    release: str, put: Callable[..., Published]
) -> None:
    put("one")
    second = put("two", 10)
    put_in_force(release, second.name, lambda: None)
    hold(release, second.name, ["what a kill left"])
    assert states(release) == ["earlier", "in force"]
    assert promote(release) == second.name
    assert held_records(release) == {}
    hold(release, second.name, ["what a kill left"])
    put("three", 9)
    assert states(release) == ["earlier", "earlier", "in force"]
    assert held_records(release) == {}


def test_a_rollback_killed_before_its_end_is_finished_by_the_same_command(
    release: str, put: Callable[..., Published]
) -> None:
    first, second = put("one"), put("two")
    hold(release, second.name, ["rolled back"], rolled_back=True)
    assert states(release) == ["earlier", "in force"]
    assert rollback(release) == (second.name, first.name)
    assert states(release) == ["in force", "held"]


def test_a_run_killed_before_the_gates_answer_was_noted_comes_to_the_same_answer(
    release: str, put: Callable[..., Published]
) -> None:
    put("one")
    second = put("two", 10)
    locations.remove([below(release, "held", f"{second.name}.json")]) if locations.is_url(release) else Path(
        release, "held", f"{second.name}.json"
    ).unlink()
    assert states(release) == ["in force", "earlier"]
    assert put("two", 10) == Published(second.path, new=False, held=second.held)
    assert states(release) == ["in force", "held"]


def test_a_damaged_version_in_force_holds_nothing_back(release: str, put: Callable[..., Published]) -> None:
    first = put("one")
    damaged = below(first.path, "metrics.json")
    locations.write(damaged, b"{") if locations.is_url(release) else Path(damaged).write_bytes(b"{")
    assert put("two", 1).held == ()


def test_what_cannot_be_moved_is_told_with_what_is_there(release: str, put: Callable[..., Published]) -> None:
    def refusals(work: Iterable[Callable[[], object]]) -> list[str]:
        told = []
        for one in work:
            with pytest.raises(InputError) as caught:
                one()
            told.append(str(caught.value))
        return told

    nowhere = refusals([lambda: promote(release), lambda: rollback(release), lambda: list_versions(release)])
    assert all("there is no version here" in text and release in text for text in nowhere)
    if not locations.is_url(release):
        assert not Path(release).exists()
    first = put("one")
    for text, part in zip(
        refusals(
            [
                lambda: promote(release),
                lambda: promote(release, "7"),
                lambda: rollback(release),
                lambda: rollback(release, "1"),
            ]
        ),
        ("no version is held", "there is no version '7'", "that is not held comes before", "in force already"),
        strict=True,
    ):
        assert part in text
        assert release in text
        assert f"name one of {first.name}" in text
    assert states(release) == ["in force"]
