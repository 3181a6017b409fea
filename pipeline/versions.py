"""The versions under a release path, local or behind a URL: which is in force, which are held, and moving that.

A version is whole when its ``_SUCCESS`` is there. ``LATEST`` names the one in force. One that is held has a record
``held/<name>.json`` beside the versions, which are never touched for it; a record of the version in force counts for
nothing: it is what a killed command left, and the next one that moves ``LATEST`` removes it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import locations
from pipeline.errors import InputError, writing
from pipeline.leases import Lease, lease, locked
from pipeline.locations import below, read_file, read_json, remove_file, write_file
from pipeline.store import MANIFEST

SUCCESS, LATEST, VERSIONS = "_SUCCESS", "LATEST", "versions"
NAME = re.compile(r"\d{4,}-[0-9a-f]{8}")  # whatever else lies among the versions is somebody else's
_HELD, _FORGOTTEN = "held", "forgotten.json"


@dataclass(frozen=True)
class Held:
    """Why a version is not in force.

    Attributes:
        reasons: one sentence each.
        time: since when, in seconds since 1970.
        rolled_back: whether a person took it out of force; if not, the gate held it.
    """

    reasons: tuple[str, ...]
    time: float
    rolled_back: bool


@dataclass(frozen=True)
class Version:
    """A whole version.

    Attributes:
        name: its number and the beginning of its key.
        created: when it was published, in seconds since 1970; 0 where the storage does not tell.
        rows: of each split.
        state: ``in force``, ``held`` or ``earlier``.
        reasons: why it is held.
    """

    name: str
    created: float
    rows: dict[str, int]
    state: str
    reasons: tuple[str, ...]


@contextmanager
def publishing_lease(release: str | Path) -> Iterator[Lease]:
    """The exclusive lease under which versions are added and ``LATEST`` is moved.

    Raises:
        StorageTrouble: the storage did not answer.
    """
    here = locations.local_path(release)
    if here is None:
        with lease(locations.join(str(release), ".leases", "publish")) as held:
            yield held
    else:
        with locked(here / ".lock"):
            yield Lease()


def latest_name(release: str | Path) -> str | None:
    """The name of the version in force; what is no version's name, and might lead elsewhere, counts for nothing."""
    content = read_file(below(release, LATEST))
    name = "" if content is None else content.decode(errors="replace").strip()
    return name if NAME.fullmatch(name) else None


def version_in_force(release: str | Path) -> str | None:
    """The path or URL of the version that LATEST names, or None where there is none."""
    name = latest_name(release)
    return None if name is None else below(release, VERSIONS, name)


def newest_manifest(release: str | Path) -> dict[str, Any] | None:
    """The manifest of the whole version with the highest number, in force or not; None where there is none.

    Plans go on from it: from the version in force, a held or rolled-back one would be drawn and fitted again each time.
    """
    try:
        whole = list(whole_versions(release))
    except OSError:
        return None
    return read_json(below(release, VERSIONS, whole[-1], MANIFEST)) if whole else None


def whole_versions(release: str | Path) -> dict[str, float]:
    """The whole versions by name, in the order of their numbers, each with the time at which it became whole."""
    here = locations.local_path(release)
    if here is None:
        there = locations.entries(locations.join(str(release), VERSIONS))
        found = {name.removesuffix("/" + SUCCESS): e.modified for name, e in there.items() if name.endswith(SUCCESS)}
    else:
        marks = (here / VERSIONS).glob("*/" + SUCCESS)
        found = {mark.parent.name: mark.stat().st_mtime for mark in marks}
    return {name: found[name] for name in sorted(found, key=_order) if NAME.fullmatch(name)}


def _order(name: str) -> tuple[int, str]:
    number = name.split("-")[0]
    return (int(number) if number.isdecimal() else 0, name)


def held_records(release: str | Path) -> dict[str, Held]:
    """The records of held versions by name; see the module about one of the version in force.

    A record that lacks something, which no command of ours writes, still holds its version.
    """
    here = locations.local_path(release)
    directory = below(release, _HELD)
    files = list(locations.entries(directory)) if here is None else [path.name for path in Path(directory).glob("*")]
    names = sorted((file.removesuffix(".json") for file in files if file.endswith(".json")), key=_order)
    records = {name: read_json(_record(release, name)) for name in names if NAME.fullmatch(name)}
    return {
        name: Held(
            tuple(record.get("reasons", ["its record does not say why"])),
            record.get("time", 0.0),
            record.get("rolled_back", True),
        )
        for name, record in records.items()
        if record is not None
    }


def _record(release: str | Path, name: str) -> str:
    return below(release, _HELD, name + ".json")


def hold(release: str | Path, name: str, reasons: list[str], *, rolled_back: bool = False) -> None:
    """Note that a version is held; its files stay as they are."""
    record = {"reasons": reasons, "time": time.time(), "rolled_back": rolled_back}
    write_file(_record(release, name), json.dumps(record, indent=1) + "\n")


def put_in_force(release: str | Path, name: str, check: Callable[[], None]) -> None:
    """Move LATEST to a whole version.

    Args:
        release: the release path or URL, whose `publishing_lease` is held.
        name: the version's name.
        check: makes sure that it is held still (`pipeline.leases.Lease.check`).
    """
    if latest_name(release) != name:
        check()
        write_file(below(release, LATEST), name + "\n")
    # After LATEST: a record without a version in force would be the word of nobody.
    remove_file(_record(release, name))


@dataclass(frozen=True)
class Forgotten:
    """What must not be labelled or published again.

    Attributes:
        contents: the content hashes of the texts, sorted.
        pending: while they are being removed: the content hashes of each row id, by which a killed command goes on.
        sources: while they are being removed: the user's files that hold them.
    """

    contents: list[str] = field(default_factory=list)
    pending: dict[str, list[str]] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)


def read_forgotten(release: str | Path) -> Forgotten:
    """What was forgotten under a release path.

    Raises:
        InputError: the file can't be read: to go on without it would bring back what was to be forgotten.
    """
    location = below(release, _FORGOTTEN)
    content = read_file(location)
    if content is None:
        return Forgotten()
    try:
        return Forgotten(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"can't read what was forgotten: {error}", where=location, fix="put it back from a backup"
        ) from error


def write_forgotten(release: str | Path, forgotten: Forgotten) -> None:
    """Replace what is noted as forgotten under a release path."""
    write_file(below(release, _FORGOTTEN), json.dumps(vars(forgotten), indent=1, sort_keys=True) + "\n")


def list_versions(release: str | Path) -> list[Version]:
    """Every whole version in the order of the numbers.

    Raises:
        InputError: there is none.
    """
    whole = some_versions(release)
    latest, records = latest_name(release), held_records(release)
    found = []
    for name, created in whole.items():
        manifest = read_json(below(release, VERSIONS, name, MANIFEST)) or {}
        held = None if name == latest else records.get(name)
        state = "in force" if name == latest else "held" if held else "earlier"
        found.append(Version(name, created, manifest.get("rows", {}), state, held.reasons if held else ()))
    return found


def promote(release: str | Path, version: str | None = None) -> str:
    """Put a version in force.

    Args:
        release: the release path or URL.
        version: its name or number; by default the newest that is held.

    Returns:
        Its name.

    Raises:
        InputError: there is no such version, none is held, or the release can't be written.
        StorageTrouble: the storage did not answer.
    """
    with _moving(release) as (whole, check):
        records = held_records(release)
        # The record of the version in force is that of a promotion that was killed before its end.
        held = [name for name in whole if name in records]
        name = _chosen(release, version, whole, held, f"no version is held; {_in_force(release)}")
        tidy(release)
        put_in_force(release, name, check)
        return name


def rollback(release: str | Path, version: str | None = None) -> tuple[str, str]:
    """Put an earlier version in force, and hold the one that was, so that no unchanged run brings it back.

    Args:
        release: the release path or URL.
        version: its name or number; by default the one before that in force by number, held ones left out: they
            looked worse.

    Returns:
        The name of the version that was in force, and of the one that is.

    Raises:
        InputError: there is no such version, none before it, or the release can't be written.
        StorageTrouble: the storage did not answer.
    """
    with _moving(release) as (whole, check):
        left = latest_name(release)
        if left is None:
            raise InputError(
                "no version is in force", where=str(release), fix=f"clozeline promote {release} {list(whole)[-1]}"
            )
        tidy(release)
        records = held_records(release)
        before = [name for name in whole if _order(name) < _order(left) and name not in records]
        none = f"no version that is not held comes before {left}, which is in force"
        name = _chosen(release, version, whole, before, none)
        if name == left:
            raise InputError(f"{left} is in force already", where=str(release), fix=f"name one of {', '.join(whole)}")
        # The record first: killed between the two, the same command starts from the same version again.
        hold(release, left, [f"rolled back to {name}"], rolled_back=True)
        put_in_force(release, name, check)
        return left, name


def _chosen(
    release: str | Path, version: str | None, whole: Mapping[str, float], by_default: Sequence[str], none: str
) -> str:
    """The version that a command names, or the last of those that it means by default; ``none`` tells of none."""
    if version is not None:
        return _named(release, version, whole)
    if not by_default:
        raise InputError(none, where=str(release), fix=f"name one of {', '.join(whole)}")
    return by_default[-1]


@contextmanager
def _moving(release: str | Path) -> Iterator[tuple[Mapping[str, float], Callable[[], None]]]:
    """The whole versions under the lease, and what checks it."""
    some_versions(release)  # before a lock is left where no release is
    with writing("the release", release, "ask whoever owns it"), publishing_lease(release) as held:
        yield some_versions(release), held.check


def tidy(release: str | Path) -> None:
    """Remove the record of the version in force (see the module); the `publishing_lease` must be held."""
    latest = latest_name(release)
    if latest is not None:
        remove_file(_record(release, latest))


def some_versions(release: str | Path) -> dict[str, float]:
    """`whole_versions`, of which there must be one.

    Raises:
        InputError: there is none.
    """
    whole = whole_versions(release)
    if not whole:
        raise InputError(
            "there is no version here",
            where=str(release),
            fix="give a release's directory or URL (what holds versions/ and LATEST)",
        )
    return whole


def _named(release: str | Path, version: str, whole: Mapping[str, float]) -> str:
    number = int(version) if version.isdecimal() else None
    for name in whole:
        if name == version or int(name.split("-")[0]) == number:
            return name
    raise InputError(
        f"there is no version {version!r}", where=str(release), fix=f"name one of {', '.join(whole)}, or its number"
    )


def _in_force(release: str | Path) -> str:
    latest = latest_name(release)
    return "none is in force either" if latest is None else f"{latest} is in force"
