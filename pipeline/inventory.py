"""Everything that lies in a store, listed once: on a disk or behind a URL.

A directory's inventory asks the kernel who holds a lock; one behind a URL goes by the time of the last heartbeat.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import locations
from pipeline.errors import ClozelineError
from pipeline.leases import lock_if_free
from pipeline.locations import Entry
from pipeline.remote_store import LEASES, USE_SECONDS, RemoteStore
from pipeline.store import LOCKS, MANIFEST, RELEASED, TEMPORARY, USES, Reference, Store
from pipeline.versions import held_records, latest_name, whole_versions

_RESERVED = frozenset({LEASES, LOCKS, RELEASED, TEMPORARY, USES})
_KEY = re.compile(r"[0-9a-f]{32}")
_UPLOAD_SECONDS = 86_400.0  # what is younger may belong to a builder that is at it


@dataclass(frozen=True)
class Stored:
    """An artifact as it lies in the store.

    Attributes:
        stage: its stage.
        key: its content key.
        bytes: the size of its files.
        files: how many there are.
        created: when it was published, in seconds since 1970.
        in_use: whether work that runs now needs it.
    """

    stage: str
    key: str
    bytes: int
    files: int
    created: float
    in_use: bool

    @property
    def reference(self) -> Reference:
        """Stage and key."""
        return self.stage, self.key


@dataclass(frozen=True)
class Litter:
    """Something that belongs to no artifact.

    Attributes:
        name: where it lies below the store.
        bytes: its size.
        why: what it is.
    """

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Use:
    """What running or unfinished work needs.

    Attributes:
        name: where it says so.
        live: whether it runs.
        time: when it last said so, in seconds since 1970.
        about: what it is, for people.
        holder: its process, for people.
        references: stage and key of each artifact.
    """

    name: str
    live: bool
    time: float
    about: str
    holder: str
    references: list[Reference]


def take_inventory(store: Store) -> Inventory:
    """List a store.

    Raises:
        StorageTrouble: the storage did not answer.
    """
    return _Objects(store) if isinstance(store, RemoteStore) else _Directory(store)


class Inventory:
    """All files of a store, listed once."""

    def __init__(self, store: Store, files: Mapping[str, Entry]) -> None:
        self.store, self.files = store, files
        self.inside: dict[Reference, dict[str, Entry]] = {}
        for name, entry in files.items():
            stage, _, rest = name.partition("/")
            key, _, rest = rest.partition("/")
            if rest and stage not in _RESERVED and _KEY.fullmatch(key):
                self.inside.setdefault((stage, key), {})[rest] = entry

    def artifacts(self, uses: list[Use]) -> list[Stored]:
        """Every artifact, oldest first."""
        live = {reference for use in uses if use.live for reference in use.references}
        found = [
            Stored(
                *reference,
                sum(entry.bytes for entry in files.values()),
                len(files),
                files[MANIFEST].modified,
                reference in live or self.is_busy(*reference),
            )
            for reference, files in self.inside.items()
            if MANIFEST in files
        ]
        return sorted(found, key=lambda stored: stored.created)

    def below(self, directory: str) -> dict[str, Entry]:
        """The files of a directory that are no temporary ones."""
        inside = directory + "/"
        return {n: e for n, e in self.files.items() if n.startswith(inside) and not n.startswith(inside + ".")}

    def uses(self) -> list[Use]:
        """What running and unfinished work needs."""
        found = []
        for name, entry in self.below(USES).items():
            record = self.read(name)
            if record is not None:
                about = " ".join(str(value) for value in record["about"].values())
                references = [(stage, key) for stage, key in record["references"]]
                found.append(Use(name, self.is_live(name), entry.modified, about, record["holder"], references))
        return found

    def releases(self, keep: int) -> tuple[dict[Reference, str], list[Litter]]:
        """What the last versions were made of, and the held ones, and the records of older versions.

        Args:
            keep: how many versions of each task at each release path count, that in force first, then the last ones.
                A held one, which somebody may promote, is none of them.
        """
        found = {name: record for name in sorted(self.below(RELEASED), reverse=True) if (record := self.read(name))}
        standing = {release: _standing(release) for release in sorted({record["release"] for record in found.values()})}

        def is_in_force(name: str) -> bool:
            return bool(found[name]["version"] == standing[found[name]["release"]][0])

        kept: dict[tuple[str, str], set[str]] = {}
        reasons: dict[Reference, str] = {}
        outdated = []
        for name in sorted(found, key=is_in_force, reverse=True):
            release, version = found[name]["release"], found[name]["version"]
            held = standing[release][1]
            mine = kept.setdefault((found[name]["name"], release), set())
            # A version that was found unchanged is recorded again; it is one version all the same.
            if version in mine or (version not in held and len(mine - held) >= keep):
                outdated.append(Litter(name, self.files[name].bytes, "the record of an older release"))
                continue
            mine.add(version)
            state = "held" if version in held else "released"
            for stage, key in found[name]["references"]:
                reasons.setdefault((stage, key), f"{state}: {version} at {release}")
        return reasons, outdated

    def read(self, name: str) -> dict[str, Any] | None:
        """A small JSON file; None where it has gone meanwhile, or is none."""
        raise NotImplementedError

    def is_live(self, use: str) -> bool:
        """Whether the work that wrote a file under ``uses/`` runs."""
        raise NotImplementedError

    def is_busy(self, stage: str, key: str) -> bool:
        """Whether somebody builds an artifact."""
        raise NotImplementedError

    def litter(self, *, young: bool = False) -> list[Litter]:
        """What killed processes left.

        Args:
            young: whether an upload that was begun within a day, and that nobody is seen to be at, is litter too.
        """
        raise NotImplementedError

    def discard(self, stored: Stored) -> bool:
        """Remove an artifact, unless somebody is building it; gives whether it went."""
        raise NotImplementedError

    def sweep(self, names: list[str]) -> None:
        """Remove litter."""
        raise NotImplementedError


def _standing(release: str) -> tuple[str | None, frozenset[str]]:
    """The version in force under a release path, and the held ones; none where it can't be read from here."""
    try:
        latest = latest_name(release)
        return latest, frozenset((held_records(release).keys() & whole_versions(release).keys()) - {latest})
    except (OSError, ClozelineError):
        return None, frozenset()


def dead_work(root: Path) -> list[Path]:
    """What killed builders and collections left under ``tmp/``.

    Args:
        root: of a store in a directory, or of the cache of one behind a URL (`Store.root`).
    """
    found = []
    for path in sorted((root / TEMPORARY).glob("*")):
        stage, _, rest = path.name.partition("-")
        if stage == "gc":
            found.append(path)
        elif _KEY.match(rest):
            with lock_if_free(root / LOCKS / f"{stage}-{rest[:32]}") as free:
                if free:
                    found.append(path)
    return found


class _Directory(Inventory):
    """A store in a directory."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, _walk(store))

    def read(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.store.root / name).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def is_live(self, use: str) -> bool:
        with lock_if_free(self.store.root / use) as free:
            return not free

    def is_busy(self, stage: str, key: str) -> bool:
        with lock_if_free(self.store.root / LOCKS / f"{stage}-{key}") as free:
            return not free

    def litter(self, *, young: bool = False) -> list[Litter]:
        found = [
            Litter(f"{stage}/{key}", sum(entry.bytes for entry in files.values()), "an artifact without a manifest")
            for (stage, key), files in self.inside.items()
            if MANIFEST not in files and not self.is_busy(stage, key)
        ]
        root = self.store.root
        for path in dead_work(root):
            name = f"{TEMPORARY}/{path.name}"
            size = sum(entry.bytes for file, entry in self.files.items() if file.startswith(name + "/"))
            found.append(Litter(name, size, "the work of a builder that is dead"))
        for name, entry in self.files.items():
            # Not registered yet: its work was killed at its very start, or is just about to be named.
            if (
                name.startswith(f"{USES}/.")
                and time.time() - entry.modified > _UPLOAD_SECONDS
                and not self.is_live(name)
            ):
                found.append(Litter(name, entry.bytes, "work that ended without a word long ago"))
        for path in sorted((root / LOCKS).glob("*-*")):
            stage, _, key = path.name.partition("-")
            if _KEY.fullmatch(key) and not self.is_busy(stage, key):
                found.append(Litter(f"{LOCKS}/{path.name}", 0, "a lock that nobody holds"))
        return found

    def discard(self, stored: Stored) -> bool:
        with lock_if_free(self.store.root / LOCKS / f"{stored.stage}-{stored.key}") as free:
            if free:
                self._remove(f"{stored.stage}/{stored.key}")
        return free

    def sweep(self, names: list[str]) -> None:
        for name in names:
            if name.startswith(f"{LOCKS}/"):
                with lock_if_free(self.store.root / name) as free:
                    if free:
                        (self.store.root / name).unlink(missing_ok=True)
            else:
                self._remove(name)

    def _remove(self, name: str) -> None:
        # A name is there whole or not at all: what is half deleted lies under tmp/.
        away = self.store.root / TEMPORARY / f"gc-{uuid.uuid4().hex}"
        away.parent.mkdir(exist_ok=True)
        try:
            os.rename(self.store.root / name, away)
        except FileNotFoundError:
            return
        if away.is_dir():
            shutil.rmtree(away, ignore_errors=True)
        else:
            away.unlink()


def _walk(store: Store) -> dict[str, Entry]:
    found = {}
    for directory, _, names in os.walk(store.root):
        for name in names:
            path = os.path.join(directory, name)
            try:
                status = os.stat(path)
            except FileNotFoundError:
                continue
            found[os.path.relpath(path, store.root)] = Entry(status.st_size, status.st_mtime, "")
    return dict(sorted(found.items()))


class _Objects(Inventory):
    """A store behind a URL."""

    def __init__(self, store: RemoteStore) -> None:
        super().__init__(store, locations.entries(store.location))
        self.leases: dict[str, list[str]] = {}
        for name in self.below(LEASES):
            self.leases.setdefault(name.split("/")[1], []).append(name)

    def read(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads(locations.read(self._url(name)) or b""))
        except ValueError:
            return None

    def is_live(self, use: str) -> bool:
        return time.time() - self.files[use].modified < 5 * USE_SECONDS

    def is_busy(self, stage: str, key: str) -> bool:
        links = self.leases.get(f"{stage}-{key}")
        if not links or time.time() - self.files[links[-1]].modified > 5 * USE_SECONDS:
            return False
        link = self.read(links[-1])
        return link is not None and not link["released"]

    def litter(self, *, young: bool = False) -> list[Litter]:
        found = []
        for (stage, key), files in self.inside.items():
            prefixes: dict[str, list[Entry]] = {}
            for name, entry in files.items():
                if name != MANIFEST:
                    prefixes.setdefault(name.split("/")[0], []).append(entry)
            if MANIFEST in files and len(prefixes) == 1:
                continue
            manifest = self.read(f"{stage}/{key}/{MANIFEST}") if MANIFEST in files else None
            for prefix, entries in prefixes.items():
                named = manifest is not None and manifest.get("prefix") == prefix
                old = time.time() - max(entry.modified for entry in entries) > _UPLOAD_SECONDS
                if not named and (old or (young and not self.is_busy(stage, key))):
                    size = sum(entry.bytes for entry in entries)
                    found.append(Litter(f"{stage}/{key}/{prefix}", size, "an upload that was never published"))
        for name, links in self.leases.items():
            if time.time() - max(self.files[link].modified for link in links) > _UPLOAD_SECONDS:
                found.append(Litter(f"{LEASES}/{name}", 0, "a lease that nobody holds"))
        return found

    def discard(self, stored: Stored) -> bool:
        inside = f"{stored.stage}/{stored.key}"
        names = [f"{inside}/{name}" for name in self.inside[stored.reference]]
        manifest = f"{inside}/{MANIFEST}"
        # An artifact is gone with its manifest; files that a killed collection leaves are an unpublished upload.
        locations.remove([self._url(manifest)])
        locations.remove(self._url(name) for name in names if name != manifest)
        shutil.rmtree(self.store.path_of(*stored.reference), ignore_errors=True)
        return True

    def sweep(self, names: list[str]) -> None:
        swept = set(names)
        gone = [name for name in self.files if swept & {"/".join(name.split("/")[:n]) for n in range(1, 4)}]
        locations.remove(self._url(name) for name in gone)

    def _url(self, name: str) -> str:
        return locations.join(self.store.location, name)
